//! Block formats: weights as a few bits each, with scales that a block of them shares, laid out as ggml does
//! (llama.cpp, `ggml/src/ggml-common.h`), so that blocks of GGUF files are ours and ours are theirs.
//!
//! A format is one implementation of [`BlockFormat`] and one line in [`FORMATS`]; decoding gives the bits that the
//! layout's definition says, encoding searches for scales of small squared error (`search`).
//!
//! Legend: a *block* is `block_len` numbers in `block_bytes` bytes; a *code* is a number's few bits.

mod codebook;
mod k_quants;
mod numbers;
mod plain;
mod uniform;

use crate::isa::Isa;
use crate::parallel::{DisjointMut, for_each_index};
use crate::simd::{Kernel, Simd, dispatch};

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

    /// The numbers of a block: `BYTES` bytes to `LEN` numbers.
    fn decode(block: &[u8], out: &mut [f32]);
}

/// What [`Format`] knows of a format.
struct Entry {
    format: Format,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    decode: fn(Isa, &[u8], &mut [f32]),
}

impl Entry {
    const fn of<B: BlockFormat>() -> Self {
        Self {
            format: B::FORMAT,
            name: B::NAME,
            block_len: B::LEN,
            block_bytes: B::BYTES,
            decode: |isa, bytes, out| dispatch(isa, Decode::<B> { bytes, out, format: std::marker::PhantomData }),
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

    fn check_bytes(self, found: usize, numbers: usize) {
        let (name, wanted) = (self.name(), self.bytes_of(numbers));
        assert_eq!(Some(found), wanted, "{name}: bytes for {numbers} numbers");
    }

    fn entry(self) -> &'static Entry {
        &FORMATS[self as usize]
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
    format: std::marker::PhantomData<B>,
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

#[cfg(test)]
mod tests;
