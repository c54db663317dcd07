//! [`QuantisedMatrix`]: a weight in a block format, laid out as the kernels read it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::driver::Kernel;
use super::layout::{BLOCK, GROUPS, LANES, Layout};
use super::q4::{Float, Linear, NonLinear, Q4};
use super::q4_k::Q4K;
use super::q6_k::Q6K;
use super::q8::Q8;
use crate::isa::Isa;
use crate::memory::{Buffer, MappedFile};
use crate::parallel::{self, DisjointMut};

/// A published block format that the kernels multiply with as it is: packing only moves its bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum BlockFormat {
    /// 8 bits, an f16 scale for each 32: 8.5 bits a weight.
    Q8_0,
    /// 4 bits, an f16 scale for each 32: 4.5 bits a weight.
    Q4_0,
    /// 4 bits that stand for quantiles of a bell curve, an f16 scale for each 32: 4.5 bits a weight.
    Iq4Nl,
    /// 4 bits that are a tiny float, a power of two for each 32 (OCP Microscaling Formats 1.0); 4.5 bits packed.
    Mxfp4,
    /// 4 bits, a 6-bit scale and minimum for each 32, two f16 for each 256: 4.625 bits packed.
    Q4K,
    /// 6 bits, an 8-bit scale for each 16, an f16 for each 256: 6.625 bits packed.
    Q6K,
}

/// Calls a generic function with the layout of a format.
macro_rules! with_layout {
    ($format:expr, $function:ident($($argument:expr),*)) => {
        match $format {
            BlockFormat::Q8_0 => $function::<Q8>($($argument),*),
            BlockFormat::Q4_0 => $function::<Q4<Linear>>($($argument),*),
            BlockFormat::Iq4Nl => $function::<Q4<NonLinear>>($($argument),*),
            BlockFormat::Mxfp4 => $function::<Q4<Float>>($($argument),*),
            BlockFormat::Q4K => $function::<Q4K>($($argument),*),
            BlockFormat::Q6K => $function::<Q6K>($($argument),*),
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
        bias: L::BIAS,
        halves: L::HALVES,
    }
}

impl BlockFormat {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Q8_0, Self::Q4_0, Self::Iq4Nl, Self::Mxfp4, Self::Q4K, Self::Q6K];

    fn facts(self) -> Facts {
        with_layout!(self, facts())
    }

    pub(super) fn kernel(self, isa: Isa) -> Kernel {
        fn kernel<L: Layout>(isa: Isa) -> Kernel {
            Kernel::of::<L>(isa)
        }
        with_layout!(self, kernel(isa))
    }

    /// Elements along K that stand and fall together: `k` of a matrix is a multiple of it.
    pub fn block_len(self) -> usize {
        match self {
            Self::Q4K | Self::Q6K => 256,
            _ => BLOCK,
        }
    }

    /// Bytes of a block in the published format.
    pub fn block_bytes(self) -> usize {
        let facts = self.facts();
        facts.source_bytes * self.block_len() / (facts.unit_blocks * BLOCK)
    }

    /// Bytes of a packed `[n, k]` matrix, if its `k` fits and they can be counted.
    pub fn packed_bytes(self, n: usize, k: usize) -> Option<usize> {
        let facts = self.facts();
        let units = k.div_ceil(facts.unit_blocks * BLOCK);
        let whole = k.is_multiple_of(self.block_len());
        let panel = units.checked_mul(facts.unit_bytes)?;
        whole.then(|| n.div_ceil(LANES).checked_mul(panel)).flatten()
    }

    pub(super) fn bias(self) -> (i32, bool) {
        let facts = self.facts();
        (facts.bias, facts.halves)
    }
}

/// Where packed bytes are.
#[derive(Clone)]
enum Storage {
    Memory(Arc<Buffer<u8>>),
    File(Arc<MappedFile>, Range<usize>),
}

/// A matrix `[n, k]` (`n` outputs) in panels of sixteen outputs. Cloning shares the bytes.
#[derive(Clone)]
pub struct QuantisedMatrix {
    format: BlockFormat,
    n: usize,
    k: usize,
    units: usize,
    unit_blocks: usize,
    panel_bytes: usize,
    storage: Storage,
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
    pub fn pack(format: BlockFormat, n: usize, k: usize, source: &[u8]) -> Self {
        let bytes = format.packed_bytes(n, k).expect("whole rows of a matrix that fits into memory");
        let mut packed = Buffer::zeroed(bytes);
        Self::pack_into(format, n, k, source, &mut packed);
        Self::new(format, n, k, Storage::Memory(Arc::new(packed)))
    }

    /// As [`QuantisedMatrix::pack`], into bytes that are zero.
    ///
    /// # Panics
    /// As there; or if there are not [`BlockFormat::packed_bytes`] bytes.
    pub fn pack_into(format: BlockFormat, n: usize, k: usize, source: &[u8], packed: &mut [u8]) {
        fn pack<L: Layout>(source: &[u8], column: usize, unit: &mut [u8]) {
            L::pack(source, column, unit);
        }
        let facts = format.facts();
        let row_bytes = k / format.block_len() * format.block_bytes();
        assert_eq!(source.len(), n * row_bytes, "bytes of {n} rows of {k} weights in {format:?}");
        assert_eq!(Some(packed.len()), format.packed_bytes(n, k), "bytes of a packed matrix");
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

    /// A packed matrix that stands in a mapped file.
    ///
    /// # Errors
    /// The number of bytes wanted, if the range holds another, or leaves the file.
    pub fn mapped(
        format: BlockFormat,
        n: usize,
        k: usize,
        file: Arc<MappedFile>,
        range: Range<usize>,
    ) -> Result<Self, Option<usize>> {
        let wanted = format.packed_bytes(n, k);
        if wanted != Some(range.len()) || file.get(range.clone()).is_none() {
            return Err(wanted);
        }
        Ok(Self::new(format, n, k, Storage::File(file, range)))
    }

    fn new(format: BlockFormat, n: usize, k: usize, storage: Storage) -> Self {
        let facts = format.facts();
        let units = k.div_ceil(facts.unit_blocks * BLOCK);
        Self { format, n, k, units, unit_blocks: facts.unit_blocks, panel_bytes: units * facts.unit_bytes, storage }
    }

    /// Its format.
    pub fn format(&self) -> BlockFormat {
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
        match &self.storage {
            Storage::Memory(bytes) => bytes,
            Storage::File(file, range) => &file[range.clone()],
        }
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
                let scales = [0, usize::from(L::HALVES)].map(|half| L::scales(unit, block, half)[column]);
                let min = L::mins(unit, block)[column];
                for (k, out) in out.iter_mut().enumerate() {
                    let code = i32::from(codes[k / 4][column * 4 + k % 4]) - L::BIAS;
                    *out = scales[k / (BLOCK / 2)] * code as f32 - min;
                }
            }
        }
        assert!(row < self.n && out.len() == self.k, "row {row} of {self:?} into {} numbers", out.len());
        debug_assert_eq!(GROUPS * 4, BLOCK);
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
