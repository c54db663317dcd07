//! Token shards: the ids of a corpus in one memory-mapped file.
//!
//! All numbers are little-endian. A header of 64 bytes, then the tokens:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `MOEBTOKS` |
//! | 8..12 | format version, 1 |
//! | 12..16 | bytes a token, 2 or 4 |
//! | 16..24 | number of tokens |
//! | 24..32 | size of the vocabulary; every token is below it |
//! | 32..40 | fingerprint of what the shard was made from |
//! | 40..48 | fingerprint of the tokens' bytes |
//! | 48..56 | zero |
//! | 56..64 | fingerprint of bytes 0..56 |

use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use moebius_kernels::memory::MappedFile;

use crate::digest::{Digest, Hasher};
use crate::{Result, TrainError, files};

const MAGIC: &[u8; 8] = b"MOEBTOKS";
const VERSION: u32 = 1;
const HEADER: usize = 64;

/// The header of a shard whose tokens have the fingerprint `body`.
fn header(width: usize, len: u64, vocab_size: usize, source: Digest, body: Digest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(width as u32).to_le_bytes());
    for number in [len, vocab_size as u64, source.0, body.0, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let seal = Digest::of(&bytes).0;
    bytes.extend_from_slice(&seal.to_le_bytes());
    bytes
}

/// Writes a shard as the tokens come; until it is finished, its name does not exist.
pub struct ShardWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    width: usize,
    len: u64,
    vocab_size: usize,
    source: Digest,
    body: Hasher,
}

impl ShardWriter {
    /// Begins a shard. `source` is the fingerprint of what the tokens are made from: texts, tokenizer, settings.
    ///
    /// # Errors
    /// The system's.
    pub fn create(path: &Path, vocab_size: usize, source: Digest) -> Result<Self> {
        let temporary = files::unfinished(path);
        let file = File::create(&temporary).map_err(TrainError::io("create", &temporary))?;
        let width = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let mut writer = Self {
            path: path.to_path_buf(),
            temporary,
            file: BufWriter::with_capacity(1 << 20, file),
            width,
            len: 0,
            vocab_size,
            source,
            body: Hasher::default(),
        };
        writer.write(&[0; HEADER])?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(TrainError::io("write", &self.temporary))
    }

    /// Appends tokens.
    ///
    /// # Errors
    /// The system's.
    ///
    /// # Panics
    /// On a token beyond the vocabulary.
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        assert!(tokens.iter().all(|&token| (token as usize) < self.vocab_size), "a token beyond the vocabulary");
        let mut bytes = Vec::with_capacity(tokens.len() * self.width);
        tokens.iter().for_each(|token| bytes.extend_from_slice(&token.to_le_bytes()[..self.width]));
        self.body.write(&bytes);
        self.len += tokens.len() as u64;
        self.write(&bytes)
    }

    /// Writes the header and gives the file its name.
    ///
    /// # Errors
    /// The system's.
    pub fn finish(mut self) -> Result<()> {
        let header = header(self.width, self.len, self.vocab_size, self.source, self.body.finish());
        self.file.rewind().map_err(TrainError::io("write", &self.temporary))?;
        self.write(&header)?;
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(TrainError::io("write", &self.temporary))?;
        std::fs::rename(&self.temporary, &self.path).map_err(TrainError::io("rename", &self.temporary))?;
        files::sync_folder(self.path.parent().unwrap_or(Path::new(".")))
    }
}

/// A checked shard over any bytes: a [`MappedFile`], or a vector in tests.
#[derive(Debug)]
pub struct TokenShard<B = MappedFile> {
    bytes: B,
    path: PathBuf,
    width: usize,
    len: usize,
    vocab_size: usize,
    source: Digest,
}

impl TokenShard {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// As [`TokenShard::from_bytes`], or the system's.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(path, MappedFile::open(path).map_err(TrainError::io("map", path))?)
    }
}

/// The `N` bytes at `at`; the caller has checked that they are there.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes")
}

impl<B: Deref<Target = [u8]>> TokenShard<B> {
    /// Checks everything about `bytes` before any of it is used; `path` is for messages.
    ///
    /// # Errors
    /// A foreign, torn, lengthened, shortened or changed file, a token beyond the vocabulary.
    pub fn from_bytes(path: &Path, bytes: B) -> Result<Self> {
        let refuse = |wanted: String, found: String| TrainError::Shard { path: path.to_path_buf(), wanted, found };
        if bytes.len() < HEADER {
            return Err(refuse(format!("a header of {HEADER} bytes"), format!("a file of {} bytes", bytes.len())));
        }
        if bytes[..8] != MAGIC[..] {
            return Err(refuse("the mark MOEBTOKS".into(), format!("{:?}", String::from_utf8_lossy(&bytes[..8]))));
        }
        let number = |at| u64::from_le_bytes(field(&bytes, at));
        let (version, width) = (u32::from_le_bytes(field(&bytes, 8)), u32::from_le_bytes(field(&bytes, 12)));
        if version != VERSION {
            return Err(refuse(format!("format version {VERSION}"), version.to_string()));
        }
        let seal = Digest::of(&bytes[..56]);
        if number(56) != seal.0 || number(48) != 0 {
            return Err(refuse("a header that matches its fingerprint".into(), "a changed one".into()));
        }
        if width != 2 && width != 4 {
            return Err(refuse("2 or 4 bytes a token".into(), width.to_string()));
        }
        let body = bytes.len() - HEADER;
        let claimed = number(16).checked_mul(u64::from(width));
        if claimed != Some(body as u64) {
            let wanted = format!("{} tokens of {width} bytes", number(16));
            return Err(refuse(wanted, format!("{body} bytes of tokens")));
        }
        if Digest::of(&bytes[HEADER..]) != Digest(number(40)) {
            return Err(refuse("tokens that match their fingerprint".into(), "changed ones".into()));
        }
        let vocab_size = usize::try_from(number(24)).unwrap_or(usize::MAX);
        let (len, width) = (body / width as usize, width as usize);
        let source = Digest(number(32));
        let shard = Self { bytes, path: path.to_path_buf(), width, len, vocab_size, source };
        let beyond = (0..len).find(|&at| shard.token(at) as usize >= vocab_size);
        match beyond {
            None => Ok(shard),
            Some(at) => Err(refuse(format!("tokens below {vocab_size}"), format!("{} at {at}", shard.token(at)))),
        }
    }

    /// The token at `at`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn token(&self, at: usize) -> u32 {
        assert!(at < self.len, "token {at} of {}", self.len);
        let start = HEADER + at * self.width;
        match self.width {
            2 => u32::from(u16::from_le_bytes(field(&self.bytes, start))),
            _ => u32::from_le_bytes(field(&self.bytes, start)),
        }
    }

    /// Appends `len` tokens from `start` on to `out`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn copy(&self, start: usize, len: usize, out: &mut Vec<u32>) {
        out.extend((start..start + len).map(|at| self.token(at)));
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Every token is below this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The fingerprint of what the shard was made from.
    pub fn source(&self) -> Digest {
        self.source
    }

    /// The fingerprint of the tokens themselves.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        hasher.write_u64(self.width as u64);
        hasher.write(&self.bytes[HEADER..]);
        hasher.finish()
    }

    /// Where the shard lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes of a shard that holds `tokens`.
    fn encode_shard(tokens: &[u32], vocab_size: usize, source: Digest) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        let mut writer = ShardWriter::create(&path, vocab_size, source).unwrap();
        tokens.chunks(7).for_each(|part| writer.append(part).unwrap());
        assert!(!path.exists(), "no name before it is whole");
        writer.finish().unwrap();
        std::fs::read(&path).unwrap()
    }

    fn read(bytes: Vec<u8>) -> Result<TokenShard<Vec<u8>>> {
        TokenShard::from_bytes(Path::new("train.tokens"), bytes)
    }

    fn tokens_of(shard: &TokenShard<Vec<u8>>) -> Vec<u32> {
        let mut tokens = Vec::new();
        shard.copy(0, shard.len(), &mut tokens);
        tokens
    }

    /// Puts `number` at `at` and seals the header again, as a careful forger would.
    fn forge(mut bytes: Vec<u8>, at: usize, number: u64) -> Vec<u8> {
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        let seal = Digest::of(&bytes[..56]).0;
        bytes[56..64].copy_from_slice(&seal.to_le_bytes());
        bytes
    }

    #[test]
    fn forged_headers_are_refused() {
        let sound = encode_shard(&[1, 2, 3], 10, Digest(7));
        for (at, number, message) in [
            (16, u64::MAX, "wanted 18446744073709551615 tokens of 2 bytes, found 6 bytes of tokens"),
            (16, 2, "wanted 2 tokens of 2 bytes, found 6 bytes of tokens"),
            (16, (1 << 63) + 3, "wanted 9223372036854775811 tokens of 2 bytes, found 6 bytes of tokens"),
            (24, 3, "wanted tokens below 3, found 3 at 2"),
            (24, 0, "wanted tokens below 0, found 1 at 0"),
            (40, 0, "wanted tokens that match their fingerprint, found changed ones"),
            (48, 1, "wanted a header that matches its fingerprint, found a changed one"),
            (8, 1 | (3 << 32), "wanted 2 or 4 bytes a token, found 3"),
            (8, 2 | (2 << 32), "wanted format version 1, found 2"),
        ] {
            let error = read(forge(sound.clone(), at, number)).expect_err(message);
            assert_eq!(error.to_string(), format!("train.tokens: token shard: {message}"));
        }
    }

    proptest! {
        #[test]
        fn round_trip(tokens in prop::collection::vec(0_u32..70_000, 0..200), wide: bool) {
            let limit = if wide { 70_000 } else { 65_536 };
            let tokens = tokens.into_iter().map(|token| token % limit).collect::<Vec<_>>();
            let shard = read(encode_shard(&tokens, limit as usize, Digest(9))).unwrap();
            prop_assert_eq!(tokens_of(&shard), tokens);
            prop_assert_eq!((shard.vocab_size(), shard.source()), (limit as usize, Digest(9)));
        }

        /// Whatever the bytes: an error or a shard, never a panic.
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), marked: bool) {
            let mut bytes = bytes;
            if marked && bytes.len() >= 16 {
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..16].copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
            }
            prop_assert!(read(bytes).is_err());
        }

        /// One changed bit anywhere, or a cut or lengthened file, is found out.
        #[test]
        fn one_change(tokens in prop::collection::vec(0_u32..1000, 1..50), at: prop::sample::Index, bit in 0..8_u32, cut: bool) {
            let mut bytes = encode_shard(&tokens, 1000, Digest(1));
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            prop_assert!(read(bytes).is_err());
        }

        /// Forged numbers with a mended fingerprint: still no panic, and what is accepted is in range.
        #[test]
        fn forged_numbers(at in prop::sample::select(vec![8_usize, 16, 24, 32]), number: u64, small: bool) {
            let bytes = encode_shard(&[5, 6, 7, 8], 9, Digest(1));
            let number = if small { number % 16 } else { number };
            if let Ok(shard) = read(forge(bytes, at, number)) {
                prop_assert!(tokens_of(&shard).iter().all(|&token| (token as usize) < shard.vocab_size()));
            }
        }
    }
}
