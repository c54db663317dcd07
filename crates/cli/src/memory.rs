//! How much memory this process takes and how much there is, where the system says so (Linux).

/// A number of `/proc/self/status` or `/proc/meminfo`, in bytes; none on other systems.
fn read(file: &str, key: &str) -> Option<u64> {
    parse(&std::fs::read_to_string(file).ok()?, key)
}

/// The number of the line `key:   12345 kB`, in bytes.
fn parse(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Memory that this process has in use now.
pub fn resident() -> Option<u64> {
    read("/proc/self/status", "VmRSS")
}

/// Memory that another process has in use now.
pub fn resident_of(pid: u32) -> Option<u64> {
    read(&format!("/proc/{pid}/status"), "VmRSS")
}

/// The most that it ever had in use.
pub fn peak() -> Option<u64> {
    read("/proc/self/status", "VmHWM")
}

/// Memory that programs may still take.
pub fn available() -> Option<u64> {
    read("/proc/meminfo", "MemAvailable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_system() {
        let text = "VmPeak:\t  999 kB\nVmRSS:\t   20 kB\nThreads:\t2\n";
        assert_eq!(parse(text, "VmRSS"), Some(20 << 10));
        assert_eq!((parse(text, "Threads"), parse(text, "VmHWM")), (None, None));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_memory() {
        assert!(resident().unwrap() > 1 << 20 && peak() >= resident() && available().unwrap() > 0);
        assert!(resident_of(std::process::id()).unwrap() > 1 << 20 && resident_of(u32::MAX).is_none());
    }
}
