//! Which instruction set the kernels use: found when running, forced lower with `MOEBIUS_ISA`, or within a test.
//!
//! Each kernel asks [`Isa::current`] once where it is entered and hands the answer down, so that one call never mixes
//! two instruction sets. The choice can change the last bits of a result, never its meaning.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// The environment variable that forces a lower instruction set.
pub const ENVIRONMENT_VARIABLE: &str = "MOEBIUS_ISA";

/// An instruction set, from the least to the most able; each one includes those before it.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Isa {
    /// Plain loops, for any processor.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VNNI and BF16 (AMD Zen 4, Intel Cooper Lake and Sapphire Rapids, and later).
    Avx512,
    /// AMX tiles in bf16 and bytes beside AVX-512 (Intel Sapphire Rapids and later, when the operating system allows it).
    Amx,
}

/// Why `MOEBIUS_ISA` cannot be obeyed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IsaError {
    /// The name is none of ours.
    Unknown(String),
    /// The processor or the operating system lacks it; the second is the best there is.
    Absent(Isa, Isa),
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "{ENVIRONMENT_VARIABLE}={name}: wanted one of portable, avx2, avx512, amx")
            }
            Self::Absent(wanted, best) => {
                write!(f, "{ENVIRONMENT_VARIABLE}={wanted}: this machine has no {wanted}; the best it has is {best}")
            }
        }
    }
}

impl std::error::Error for IsaError {}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        })
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        let all = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];
        all.into_iter().find(|isa| isa.to_string() == name).ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

thread_local! {
    /// Set by [`with_isa`]; `parallel` carries it to the threads that help with a call.
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl Isa {
    /// The instruction set to use in a call made on this thread.
    ///
    /// # Panics
    /// When `MOEBIUS_ISA` asks for what is not there; a program calls [`Isa::from_environment`] first to say so kindly.
    pub fn current() -> Self {
        FORCED.get().unwrap_or_else(|| Self::from_environment().unwrap_or_else(|error| panic!("{error}")))
    }

    /// What `MOEBIUS_ISA` asks for, else the best there is. Read once a process.
    ///
    /// # Errors
    /// The variable holds an unknown name, or one that this machine lacks.
    pub fn from_environment() -> Result<Self, IsaError> {
        static CHOICE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        CHOICE
            .get_or_init(|| match std::env::var(ENVIRONMENT_VARIABLE) {
                Ok(name) if !name.is_empty() => choose(name.parse()?, Self::best()),
                _ => Ok(Self::best()),
            })
            .clone()
    }

    /// The most able instruction set of this machine.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// Every instruction set of this machine, the least able first.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx].into_iter().filter(|&isa| isa <= Self::best()).collect()
    }
}

fn choose(wanted: Isa, best: Isa) -> Result<Isa, IsaError> {
    if wanted <= best { Ok(wanted) } else { Err(IsaError::Absent(wanted, best)) }
}

/// Runs `body` with the kernels held to `isa`, on this thread and on those that help it through `parallel`.
///
/// For tests and benchmarks: other threads of the process keep their own choice.
///
/// # Panics
/// When this machine lacks `isa`.
pub fn with_isa<R>(isa: Isa, body: impl FnOnce() -> R) -> R {
    assert!(isa <= Isa::best(), "{}", IsaError::Absent(isa, Isa::best()));
    with_forced(Some(isa), body)
}

/// What [`with_isa`] holds this thread to.
pub(crate) fn forced() -> Option<Isa> {
    FORCED.get()
}

/// Runs `body` as under [`with_isa`], or as without it.
pub(crate) fn with_forced<R>(forced: Option<Isa>, body: impl FnOnce() -> R) -> R {
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(forced));
    body()
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        return Isa::Portable;
    }
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bf16");
    match avx512 {
        false => Isa::Avx2,
        true if amx_is_allowed() => Isa::Amx,
        true => Isa::Avx512,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// Whether the processor has tiles of bf16 and bytes and the operating system lets this process use them; asks it to.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_is_allowed() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    const BF16_TILE_AND_BYTES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & BF16_TILE_AND_BYTES != BF16_TILE_AND_BYTES {
        return false;
    }
    // SAFETY: this request reads and writes no memory of ours; it widens what the kernel saves for our threads, and
    // a kernel that does not know it returns an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_is_allowed() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx] {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert_eq!(error, "MOEBIUS_ISA=sse9: wanted one of portable, avx2, avx512, amx");
    }

    #[test]
    fn a_lower_one_is_granted_and_a_higher_one_refused() {
        assert_eq!(choose(Isa::Portable, Isa::Avx2), Ok(Isa::Portable));
        let error = choose(Isa::Amx, Isa::Avx2).unwrap_err().to_string();
        assert_eq!(error, "MOEBIUS_ISA=amx: this machine has no amx; the best it has is avx2");
    }

    #[test]
    fn forcing_holds_inside_only() {
        let before = Isa::current();
        with_isa(Isa::Portable, || assert_eq!(Isa::current(), Isa::Portable));
        assert_eq!(Isa::current(), before);
    }
}
