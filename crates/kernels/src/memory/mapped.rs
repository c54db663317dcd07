//! A file mapped into memory for reading: the only place of the project that maps memory.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

/// A file's bytes, read by the operating system as they are touched.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole file at `path`.
    ///
    /// # Errors
    /// Those of opening and mapping.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: as with every mapped file, its bytes change if another process writes it; ours replaces files by
        // renaming, which leaves the mapped one as it was, and parsers check what they read from it.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self { map })
    }

    /// Asks the operating system to read a part ahead of its use. Where it cannot, the part is read when touched.
    pub fn will_need(&self, range: Range<usize>) {
        #[cfg(unix)]
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_has_the_bytes_of_the_file() {
        let path = std::env::temp_dir().join(format!("moebius-mapped-{}", std::process::id()));
        std::fs::write(&path, b"expert").unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&*mapped, b"expert");
        assert!(MappedFile::open(&path).is_err());
    }
}
