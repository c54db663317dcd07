//! A 64-bit fingerprint for caches and shards: FNV-1a (Fowler, Noll, Vo 1991).
//!
//! It guards against stale caches, torn writes and flipped bits, not against an adversary.

use serde::{Deserialize, Serialize};

/// A running FNV-1a fingerprint.
///
/// Every `write_*` of variable length puts the length first, so that no two different sequences of writes give the same
/// stream of bytes.
#[derive(Clone, Copy, Debug)]
pub struct Hasher(u64);

/// A finished fingerprint; sixteen hexadecimal digits as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub u64);

impl Default for Hasher {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher {
    /// Takes in bytes as they are.
    pub fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Takes in a number as eight little-endian bytes.
    pub fn write_u64(&mut self, number: u64) {
        self.write(&number.to_le_bytes());
    }

    /// Takes in the length of `bytes`, then `bytes`.
    pub fn write_sized(&mut self, bytes: &[u8]) {
        self.write_u64(bytes.len() as u64);
        self.write(bytes);
    }

    /// The fingerprint of all that was written.
    pub fn finish(&self) -> Digest {
        Digest(self.0)
    }
}

impl Digest {
    /// The fingerprint of `bytes` alone.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.write(bytes);
        hasher.finish()
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u64::from_str_radix(&text, 16).ok()).flatten();
        number.map(Self).ok_or_else(|| format!("wanted sixteen hexadecimal digits, found {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published test vectors of FNV-1a 64.
    #[test]
    fn fnv_vectors() {
        assert_eq!(Digest::of(b"").0, 0xcbf2_9ce4_8422_2325);
        assert_eq!(Digest::of(b"a").0, 0xaf63_dc4c_8601_ec8c);
        assert_eq!(Digest::of(b"foobar").0, 0x8594_4171_f739_67e8);
    }

    #[test]
    fn text_and_back() {
        let digest = Digest(0x0123_4567_89ab_cdef);
        assert_eq!(Digest::try_from(String::from(digest)), Ok(digest));
        assert!(Digest::try_from("+123456789abcdef".to_owned()).is_err());
    }
}
