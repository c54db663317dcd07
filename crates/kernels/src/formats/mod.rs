//! Block formats: weights as a few bits each, with scales that a block of them shares, laid out as ggml does
//! (llama.cpp, `ggml/src/ggml-common.h`), so that blocks of GGUF files are ours and ours are theirs.
//!
//! A format is one implementation of `BlockFormat` and one line in `FORMATS`; decoding gives the bits that the
//! layout's definition says, encoding searches for scales of small squared error (`search`).
//!
//! Legend: a *block* is `block_len` numbers in `block_bytes` bytes; a *code* is a number's few bits.

pub(crate) mod codebook;
pub(crate) mod k_quants;
pub(crate) mod numbers;
mod plain;
mod search;
mod search_affine;
pub(crate) mod uniform;

use crate::isa::Isa;
use crate::parallel::{DisjointMut, for_each_index};
use crate::simd::{Kernel, Simd, dispatch};
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, non_camel_case_types, reason = "the names that ggml gave them")]
pub enum Format {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// The arithmetic of one format, a block at a time.
trait BlockFormat: 'static {
    const FORMAT: Format;
    const NAME: &'static str;
    /// Numbers of a block.
    const LEN: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// The largest magnitude that [`BlockFormat::encode`] takes.
    const LARGEST: f32;

    /// The numbers of a block: `BYTES` bytes to `LEN` numbers.
    fn decode(block: &[u8], out: &mut [f32]);

    /// A block for `LEN` numbers whose magnitude is at most `LARGEST`, of small squared error.
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]);
}

/// What [`Format`] knows of a format.
struct Entry {
    format: Format,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    decode: fn(Isa, &[u8], &mut [f32]),
    largest: f32,
    encode: fn(Isa, &[f32], &mut [u8]),
}

impl Entry {
    const fn of<B: BlockFormat>() -> Self {
        Self {
            format: B::FORMAT,
            name: B::NAME,
            block_len: B::LEN,
            block_bytes: B::BYTES,
            decode: |isa, bytes, out| dispatch(isa, Decode::<B> { bytes, out, format: PhantomData }),
            largest: B::LARGEST,
            encode: |isa, values, out| dispatch(isa, Encode::<B> { values, out, format: PhantomData }),
        }
    }
}

/// Every format, in the order of [`Format`].
static FORMATS: [Entry; 16] = [
    Entry::of::<plain::F32>(),
    Entry::of::<plain::F16>(),
    Entry::of::<plain::Bf16>(),
    Entry::of::<uniform::Q8_0>(),
    Entry::of::<uniform::Q4_0>(),
    Entry::of::<uniform::Q4_1>(),
    Entry::of::<uniform::Q5_0>(),
    Entry::of::<uniform::Q5_1>(),
    Entry::of::<k_quants::Q2K>(),
    Entry::of::<k_quants::Q3K>(),
    Entry::of::<k_quants::Q4K>(),
    Entry::of::<k_quants::Q5K>(),
    Entry::of::<k_quants::Q6K>(),
    Entry::of::<codebook::Iq4Nl>(),
    Entry::of::<codebook::Iq4Xs>(),
    Entry::of::<codebook::Mxfp4>(),
];

/// Numbers that one thread takes at a time: a multiple of every block.
const RUN: usize = 1 << 13;
/// Numbers up to which decoding stays on one thread.
const SERIAL_DECODE: usize = 1 << 15;

/// Why numbers cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EncodeError {
    /// A number that is NaN or infinite.
    NotFinite {
        /// Its place.
        index: usize,
        /// The number.
        value: f32,
    },
    /// A number that the format's scales do not reach.
    TooLarge {
        /// The format.
        format: Format,
        /// The number's place.
        index: usize,
        /// The number.
        value: f32,
        /// The largest magnitude it takes.
        largest: f32,
    },
    /// Numbers that do not fill whole blocks.
    Length {
        /// The format.
        format: Format,
        /// Numbers there are.
        found: usize,
    },
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotFinite { index, value } => write!(f, "wanted finite numbers, found {value} at element {index}"),
            Self::TooLarge { format, index, value, largest } => {
                write!(f, "{format} holds magnitudes up to {largest:e}, found {value:e} at element {index}")
            }
            Self::Length { format, found } => {
                write!(f, "{format} wants a multiple of {} numbers, found {found}", format.block_len())
            }
        }
    }
}

impl std::error::Error for EncodeError {}

impl Format {
    /// Every format.
    pub fn all() -> &'static [Format] {
        static ALL: [Format; FORMATS.len()] = {
            let mut all = [Format::F32; FORMATS.len()];
            let mut i = 0;
            while i < all.len() {
                assert!(FORMATS[i].format as usize == i, "the table is in the order of the enumeration");
                all[i] = FORMATS[i].format;
                i += 1;
            }
            all
        };
        &ALL
    }

    /// The format of a name as [`Format::name`] gives it, in any case of letters.
    pub fn from_name(name: &str) -> Option<Format> {
        FORMATS.iter().find(|entry| entry.name.eq_ignore_ascii_case(name)).map(|entry| entry.format)
    }

    /// Its name, `q4_k` for instance.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// Numbers of a block; 1 for the plain formats.
    pub fn block_len(self) -> usize {
        self.entry().block_len
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.entry().block_bytes
    }

    /// The bytes of `n_elements` numbers; none if they are no whole number of blocks, or the bytes too many to count.
    pub fn bytes_of(self, n_elements: usize) -> Option<usize> {
        let entry = self.entry();
        if !n_elements.is_multiple_of(entry.block_len) {
            return None;
        }
        (n_elements / entry.block_len).checked_mul(entry.block_bytes)
    }

    /// The numbers that whole blocks stand for, to the bit; a block whose scale is not finite gives what f32
    /// arithmetic says.
    ///
    /// # Panics
    /// If `bytes` are not those of `out.len()` numbers.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        self.decode_on(Isa::current(), bytes, out);
    }

    fn decode_on(self, isa: Isa, bytes: &[u8], out: &mut [f32]) {
        self.check_bytes(bytes.len(), out.len());
        let Entry { block_len, block_bytes, decode, .. } = *self.entry();
        let (len, parts) = (out.len(), DisjointMut::new(out));
        for_each_index(len.div_ceil(RUN), serial_count(len, SERIAL_DECODE), |run| {
            let (first, end) = (run * RUN, len.min((run + 1) * RUN));
            let bytes = &bytes[first / block_len * block_bytes..end / block_len * block_bytes];
            // SAFETY: runs of different indices do not overlap, and each index is handed out once.
            decode(isa, bytes, unsafe { parts.range(first..end) });
        });
    }

    /// Whether numbers can be written in this format, not only read.
    pub fn can_encode(self) -> bool {
        true
    }

    /// Writes numbers as blocks: the plain formats round to nearest, ties to even, the others search for scales of
    /// small squared error.
    ///
    /// # Errors
    /// Numbers that do not fill whole blocks, or the first that is not finite or too large; then what is in `out` means
    /// nothing.
    ///
    /// # Panics
    /// If `out` has not the length of the blocks.
    pub fn encode(self, values: &[f32], out: &mut [u8]) -> Result<(), EncodeError> {
        self.encode_on(Isa::current(), values, out)
    }

    fn encode_on(self, isa: Isa, values: &[f32], out: &mut [u8]) -> Result<(), EncodeError> {
        let Entry { block_len, block_bytes, encode, largest, .. } = *self.entry();
        if !values.len().is_multiple_of(block_len) {
            return Err(EncodeError::Length { format: self, found: values.len() });
        }
        self.check_bytes(out.len(), values.len());
        let run_bytes = RUN / block_len * block_bytes;
        let (out_len, parts, first_bad) = (out.len(), DisjointMut::new(out), AtomicUsize::new(usize::MAX));
        for_each_index(values.len().div_ceil(RUN), serial_count(values.len(), RUN), |run| {
            let numbers = &values[run * RUN..values.len().min((run + 1) * RUN)];
            if let Some(place) = first_beyond(numbers, largest) {
                first_bad.fetch_min(run * RUN + place, Ordering::Relaxed);
            } else {
                // SAFETY: runs of different indices do not overlap, and each index is handed out once.
                encode(isa, numbers, unsafe { parts.range(run * run_bytes..out_len.min((run + 1) * run_bytes)) });
            }
        });
        let index = first_bad.into_inner();
        match values.get(index) {
            None => Ok(()),
            Some(&value) if value.is_finite() => Err(EncodeError::TooLarge { format: self, index, value, largest }),
            Some(&value) => Err(EncodeError::NotFinite { index, value }),
        }
    }

    fn check_bytes(self, found: usize, numbers: usize) {
        let (name, wanted) = (self.name(), self.bytes_of(numbers));
        assert_eq!(Some(found), wanted, "{name}: bytes for {numbers} numbers");
    }

    fn entry(self) -> &'static Entry {
        &FORMATS[self as usize]
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

fn serial_count(len: usize, serial_len: usize) -> usize {
    if len <= serial_len { usize::MAX } else { 1 }
}

/// Decodes a run of blocks; compiled for each instruction set, on which the loops over a block become vectors.
struct Decode<'a, B> {
    bytes: &'a [u8],
    out: &'a mut [f32],
    format: PhantomData<B>,
}

impl<B: BlockFormat> Kernel for Decode<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (block, out) in self.bytes.chunks_exact(B::BYTES).zip(self.out.chunks_exact_mut(B::LEN)) {
            B::decode(block, out);
        }
    }
}

/// Encodes a run of blocks.
struct Encode<'a, B> {
    values: &'a [f32],
    out: &'a mut [u8],
    format: PhantomData<B>,
}

impl<B: BlockFormat> Kernel for Encode<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (values, block) in self.values.chunks_exact(B::LEN).zip(self.out.chunks_exact_mut(B::BYTES)) {
            B::encode(simd, values, block);
        }
    }
}

/// The place of the first number that is NaN or of a magnitude beyond `largest`.
fn first_beyond(values: &[f32], largest: f32) -> Option<usize> {
    let largest = largest.to_bits();
    // As bits, which are in the order of magnitudes and have NaN above all.
    let beyond = |x: &f32| x.to_bits() & 0x7fff_ffff > largest;
    let any = values.iter().fold(false, |any, x| any | beyond(x));
    if any { values.iter().position(beyond) } else { None }
}

#[cfg(test)]
mod tests;
