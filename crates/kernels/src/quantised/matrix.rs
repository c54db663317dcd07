//! [`QuantisedMatrix`]: a weight in a block format, laid out as the kernels read it.

use std::fmt;

use super::driver::Kernel;
use super::layout::{BLOCK, LANES, Layout, Scales};
use super::published::{Iq4Nl, Iq4Xs, Mxfp4, Q2K, Q3K, Q4K, Q5K, Q6K, Q40, Q41, Q50, Q51, Q80};
use crate::formats::Format;
use crate::isa::Isa;
use crate::memory::{Buffer, SharedBytes};
use crate::parallel::{self, DisjointMut};

/// Calls a generic function with the layout of a format.
macro_rules! with_layout {
    ($format:expr, $function:ident($($argument:expr),*)) => {
        match $format {
            Format::Q8_0 => $function::<Q80>($($argument),*),
            Format::Q4_0 => $function::<Q40>($($argument),*),
            Format::Q4_1 => $function::<Q41>($($argument),*),
            Format::Q5_0 => $function::<Q50>($($argument),*),
            Format::Q5_1 => $function::<Q51>($($argument),*),
            Format::Q2_K => $function::<Q2K>($($argument),*),
            Format::Q3_K => $function::<Q3K>($($argument),*),
            Format::Q4_K => $function::<Q4K>($($argument),*),
            Format::Q5_K => $function::<Q5K>($($argument),*),
            Format::Q6_K => $function::<Q6K>($($argument),*),
            Format::IQ4_NL => $function::<Iq4Nl>($($argument),*),
            Format::IQ4_XS => $function::<Iq4Xs>($($argument),*),
            Format::MXFP4 => $function::<Mxfp4>($($argument),*),
            other => unreachable!("no matrix is packed in {}", other.name()),
        }
    };
}

/// The numbers of a [`Layout`].
struct Facts {
    unit_blocks: usize,
    unit_bytes: usize,
    source_bytes: usize,
    bias: i32,
    halves: bool,
}

fn facts<L: Layout>() -> Facts {
    Facts {
        unit_blocks: L::UNIT_BLOCKS,
        unit_bytes: L::UNIT_BYTES,
        source_bytes: L::SOURCE_BYTES,
        bias: L::START_BIAS,
        halves: L::HALVES,
    }
}

/// The formats that the kernels multiply with as they are, every block format there is: packing only moves their bits.
/// Packed, a weight takes 2.625 bits in Q2_K, 3.625 in Q3_K, 4.375 in IQ4_XS, 4.5 in Q4_0, IQ4_NL and MXFP4, 4.625 in Q4_K,
/// 5 in Q4_1, 5.5 in Q5_0, 5.625 in Q5_K, 6 in Q5_1, 6.625 in Q6_K, 8.5 in Q8_0.
pub const PACKED_FORMATS: [Format; 13] = [
    Format::Q8_0,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q2_K,
    Format::Q3_K,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
    Format::IQ4_NL,
    Format::IQ4_XS,
    Format::MXFP4,
];

/// Bytes of a matrix `[n, k]` packed in a format; none if there are no kernels for the format, if its blocks do not
/// divide `k`, or if the bytes are too many to count.
pub fn packed_bytes(format: Format, n: usize, k: usize) -> Option<usize> {
    if !PACKED_FORMATS.contains(&format) || !k.is_multiple_of(format.block_len()) {
        return None;
    }
    let facts = facts_of(format);
    let panel = k.div_ceil(facts.unit_blocks * BLOCK).checked_mul(facts.unit_bytes)?;
    n.div_ceil(LANES).checked_mul(panel)
}

fn facts_of(format: Format) -> Facts {
    with_layout!(format, facts())
}

/// A matrix `[n, k]` (`n` outputs) in panels of sixteen outputs. Cloning shares the bytes.
#[derive(Clone)]
pub struct QuantisedMatrix {
    format: Format,
    n: usize,
    k: usize,
    units: usize,
    unit_blocks: usize,
    panel_bytes: usize,
    bytes: SharedBytes,
}

impl fmt::Debug for QuantisedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} [{}, {}]", self.format, self.n, self.k)
    }
}

impl QuantisedMatrix {
    /// Packs `n` rows of `k` weights, given in the published format, row after row.
    ///
    /// # Panics
    /// If the rows are not whole, or their bytes are too few or too many.
    pub fn pack(format: Format, n: usize, k: usize, source: &[u8]) -> Self {
        let bytes = packed_bytes(format, n, k).expect("whole rows of a matrix that fits into memory");
        let mut packed = Buffer::zeroed(bytes);
        Self::pack_into(format, n, k, source, &mut packed);
        Self::new(format, n, k, packed.into())
    }

    /// As [`QuantisedMatrix::pack`], into bytes that are zero.
    ///
    /// # Panics
    /// As there; or if there are not [`packed_bytes`] bytes.
    pub fn pack_into(format: Format, n: usize, k: usize, source: &[u8], packed: &mut [u8]) {
        fn pack<L: Layout>(source: &[u8], column: usize, unit: &mut [u8]) {
            L::pack(source, column, unit);
        }
        let facts = facts_of(format);
        let row_bytes = k / format.block_len() * format.block_bytes();
        assert_eq!(source.len(), n * row_bytes, "bytes of {n} rows of {k} weights in {format:?}");
        assert_eq!(Some(packed.len()), packed_bytes(format, n, k), "bytes of a packed matrix");
        let panel_bytes = packed.len() / n.div_ceil(LANES).max(1);
        let packed = DisjointMut::new(packed);
        parallel::for_each_index(n.div_ceil(LANES), 1, |panel| {
            // SAFETY: each index has a panel of its own.
            let units = unsafe { packed.range(panel * panel_bytes..(panel + 1) * panel_bytes) };
            for row in panel * LANES..n.min((panel + 1) * LANES) {
                let source = source[row * row_bytes..(row + 1) * row_bytes].chunks(facts.source_bytes);
                for (source, unit) in source.zip(units.chunks_exact_mut(facts.unit_bytes)) {
                    with_layout!(format, pack(source, row % LANES, unit));
                }
            }
        });
    }

    /// A matrix that was packed before, as in a file.
    ///
    /// # Errors
    /// The number of bytes wanted, if there are others.
    pub fn from_packed(format: Format, n: usize, k: usize, bytes: SharedBytes) -> Result<Self, Option<usize>> {
        let wanted = packed_bytes(format, n, k);
        if wanted == Some(bytes.len()) { Ok(Self::new(format, n, k, bytes)) } else { Err(wanted) }
    }

    fn new(format: Format, n: usize, k: usize, bytes: SharedBytes) -> Self {
        let facts = facts_of(format);
        let units = k.div_ceil(facts.unit_blocks * BLOCK);
        Self { format, n, k, units, unit_blocks: facts.unit_blocks, panel_bytes: units * facts.unit_bytes, bytes }
    }

    pub(super) fn kernel(&self, isa: Isa) -> Kernel {
        fn kernel<L: Layout>(isa: Isa) -> Kernel {
            Kernel::of::<L>(isa)
        }
        with_layout!(self.format, kernel(isa))
    }

    #[cfg(all(test, target_arch = "x86_64"))]
    pub(super) fn simulated_kernel(&self) -> Kernel {
        fn kernel<L: Layout>() -> Kernel {
            Kernel::simulated::<L>()
        }
        with_layout!(self.format, kernel())
    }

    #[cfg(all(test, target_arch = "x86_64"))]
    pub(super) fn kernel_without_vnni(&self) -> Kernel {
        fn kernel<L: Layout>() -> Kernel {
            Kernel::avx2_without_vnni::<L>()
        }
        with_layout!(self.format, kernel())
    }

    /// What the activations need to know: the bias of their records' starts, and whether each half of a block has its own.
    pub(super) fn bias(&self) -> (i32, bool) {
        let facts = facts_of(self.format);
        (facts.bias, facts.halves)
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The length of the sums.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The packed bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Row `row`, decoded, into `out` `[k]`.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        fn decode<L: Layout>(panel: &[u8], column: usize, out: &mut [f32]) {
            for (index, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                let (unit, block) = (&panel[index / L::UNIT_BLOCKS * L::UNIT_BYTES..], index % L::UNIT_BLOCKS);
                let codes = L::codes(unit, block);
                let scales = [0, usize::from(L::HALVES)].map(|half| L::Scales::scales(unit, block, half)[column]);
                let mins = [0, usize::from(L::HALVES)].map(|half| L::Scales::mins(unit, block, half)[column]);
                for (k, out) in out.iter_mut().enumerate() {
                    let code = i32::from(codes[k / 4][column * 4 + k % 4]) - L::BIAS;
                    *out = scales[k / (BLOCK / 2)] * code as f32 - mins[k / (BLOCK / 2)];
                }
            }
        }
        assert!(row < self.n && out.len() == self.k, "row {row} of {self:?} into {} numbers", out.len());
        with_layout!(self.format, decode(self.panel(row / LANES), row % LANES, out));
    }

    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.bytes()[panel * self.panel_bytes..(panel + 1) * self.panel_bytes]
    }

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    pub(super) fn units(&self) -> usize {
        self.units
    }

    /// Blocks of 32 along all units.
    pub(super) fn blocks(&self) -> usize {
        self.units * self.unit_blocks
    }
}
