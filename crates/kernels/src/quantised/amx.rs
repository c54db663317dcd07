//! The quantised products of many rows on AMX: `tdpbssd` multiplies a block of 16 rows with that of 16 columns.
//!
//! A panel's codes become signed bytes once for all rows. A block (a half, where halves have their own scales) gives a
//! tile of integer sums, which goes to memory and from there, with the scales, into sums of f32 in registers. Those are
//! the operations of the AVX-512 kernel in its order, on the same integers: the bits are the same.
//!
//! # Cost
//! On paper, in cycles for 16 rows, 16 columns and a block of 32 along K, on a core that starts one row of a tile
//! product and two operations of 512 bits a cycle, loads 128 and stores 64 bytes. A product takes 16, as in bf16, for
//! half of its depth is used; storing its sums takes 16, loading both operands 12, and so these overlap with what takes
//! longest: 16 conversions, 16 products of scales and 16 fused multiply-adds, 24 together (32 with minima, 48 with two
//! scales a block). That bounds the kernel at two thirds of the bf16 peak (half, a third); the AVX-512 kernel, with
//! another 128 multiplications in the same place, reaches 18 % of it. Expanding to bf16 instead would be bounded by the
//! peak alone, but rounds the weights, and then every instruction set and a single row would have to sum in its order.

use std::arch::x86_64::*;

use super::activations::Record;
use super::driver::ManyRows;
use super::layout::{BLOCK, GROUPS, LANES, Layout, Scales, x86};
use crate::memory::Buffer;
use crate::tiles::{Configuration, ROW_BYTES, Shape, Tiles, WHOLE};

/// Bytes of a block of sixteen rows or columns.
const BLOCK_BYTES: usize = LANES * BLOCK;
/// Blocks along K whose columns stay in the first cache while all rows pass over them.
const CACHED_BLOCKS: usize = 32;
/// So many tiles of integer sums are written before the first is read: what is just being stored is not there to load.
const UNDERWAY: usize = 8;
const SUMS: usize = LANES * LANES;

/// Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
const fn shapes<L: Layout>() -> [Shape; 8] {
    let rows = Shape { rows: LANES as u8, row_bytes: (BLOCK / L::PARTS) as u8 };
    let columns = Shape { rows: (GROUPS / L::PARTS) as u8, row_bytes: ROW_BYTES as u8 };
    [WHOLE, WHOLE, WHOLE, WHOLE, rows, rows, columns, columns]
}

/// Panels times the rows of `product`.
///
/// # Safety
/// As [`ManyRows`] says, on a machine with AVX-512 and `T`.
pub(super) unsafe fn multiply<T: Tiles, L: Layout>(product: &ManyRows) {
    let (matrix, blocks) = (product.matrix, product.matrix.blocks());
    let rows = Rows::pack::<L>(product.rows, blocks);
    let mut columns = Columns::unfilled::<L>(blocks);
    let mut underway = Buffer::<i32>::scratch(UNDERWAY * SUMS);
    // SAFETY: the machine has them; no caller of ours holds tiles.
    let mut tiles = unsafe { T::configure(const { &Configuration::new(shapes::<L>()) }) };
    for panel in product.panels.clone() {
        let width = LANES.min(matrix.n() - panel * LANES);
        // SAFETY: the panel is whole and `columns` made for its blocks.
        unsafe { columns.expand::<L>(matrix.panel(panel), matrix.units()) };
        for first in (0..blocks).step_by(CACHED_BLOCKS) {
            for first_row in (0..product.rows.len()).step_by(LANES) {
                let block = first_row / LANES * blocks + first;
                let chunk = Chunk {
                    blocks: CACHED_BLOCKS.min(blocks - first),
                    row_codes: rows.codes[block * BLOCK_BYTES..].as_ptr().cast(),
                    row_scales: rows.scales[block * LANES..].as_ptr(),
                    row_sums: if L::AFFINE { rows.sums[block * L::PARTS * LANES..].as_ptr() } else { std::ptr::null() },
                    codes: columns.codes[first * BLOCK_BYTES..].as_ptr().cast(),
                    scales: columns.scales[first * L::PARTS * LANES..].as_ptr(),
                    mins: if L::AFFINE { columns.mins[first * L::PARTS * LANES..].as_ptr() } else { std::ptr::null() },
                    accumulate: first > 0,
                    c: product.c.wrapping_add(first_row * matrix.n() + panel * LANES),
                    c_stride: matrix.n(),
                    rows: LANES.min(product.rows.len() - first_row),
                    columns: if width == LANES { !0 } else { (1 << width) - 1 },
                };
                // SAFETY: `ManyRows` says that C holds these rows and columns; the rest was packed above.
                unsafe { add_chunk::<T, L>(&mut tiles, underway.as_mut_ptr(), &chunk) };
            }
        }
    }
}

/// Rows of activations in tiles of sixteen, the last one filled up with zeros.
struct Rows {
    /// `[tiles][blocks][16 rows][32]`
    codes: Buffer<i8>,
    /// `[tiles][blocks][16 rows]`
    scales: Buffer<f32>,
    /// `[tiles][blocks][parts][16 rows]`, if the format has minima.
    sums: Buffer<f32>,
}

impl Rows {
    fn pack<L: Layout>(rows: &[*const Record], blocks: usize) -> Self {
        let tiles = rows.len().div_ceil(LANES);
        let mut codes = Buffer::<i8>::zeroed(tiles * blocks * BLOCK_BYTES);
        let mut scales = Buffer::<f32>::zeroed(tiles * blocks * LANES);
        let mut sums = Buffer::<f32>::zeroed(if L::AFFINE { tiles * blocks * L::PARTS * LANES } else { 0 });
        for (row, &records) in rows.iter().enumerate() {
            // SAFETY: `ManyRows` says that a row has these records.
            let records = unsafe { std::slice::from_raw_parts(records, blocks) };
            let first = row / LANES * blocks;
            for (block, record) in (first..).zip(records) {
                let place = block * LANES + row % LANES;
                codes[place * BLOCK..][..BLOCK].copy_from_slice(&record.codes);
                scales[place] = record.scale;
                if L::AFFINE {
                    for part in 0..L::PARTS {
                        sums[(block * L::PARTS + part) * LANES + row % LANES] = record.part::<L>(part);
                    }
                }
            }
        }
        Self { codes, scales, sums }
    }
}

/// A panel, expanded.
struct Columns {
    /// `[blocks][8 groups][16 columns][4]`, without the bias.
    codes: Buffer<i8>,
    /// `[blocks][parts][16 columns]`
    scales: Buffer<f32>,
    /// `[blocks][parts][16 columns]`, if the format has minima.
    mins: Buffer<f32>,
}

impl Columns {
    fn unfilled<L: Layout>(blocks: usize) -> Self {
        Self {
            codes: Buffer::scratch(blocks * BLOCK_BYTES),
            scales: Buffer::scratch(blocks * L::PARTS * LANES),
            mins: Buffer::scratch(if L::AFFINE { blocks * L::PARTS * LANES } else { 0 }),
        }
    }

    /// Takes on a panel.
    ///
    /// # Safety
    /// The panel has `units` units, `self` was made for their blocks, and the machine has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn expand<L: Layout>(&mut self, panel: &[u8], units: usize) {
        let bias = _mm512_set1_epi8(L::BIAS as u8 as i8);
        let mut codes: *mut i8 = self.codes.as_mut_ptr();
        for index in 0..units * L::UNIT_BLOCKS {
            let (unit, block) = (index / L::UNIT_BLOCKS, index % L::UNIT_BLOCKS);
            let unit = panel[unit * L::UNIT_BYTES..].as_ptr();
            x86::fetch_ahead::<L>(unit, block);
            // SAFETY: the unit is whole, and `self` has room for its blocks.
            unsafe {
                for group in 0..GROUPS {
                    let group = L::codes_512(unit, block, group);
                    _mm512_store_si512(codes.cast(), _mm512_sub_epi8(group, bias));
                    codes = codes.add(ROW_BYTES);
                }
                for part in 0..L::PARTS {
                    let place = (index * L::PARTS + part) * LANES;
                    _mm512_store_ps(self.scales.as_mut_ptr().add(place), L::Scales::scales_512(unit, block, part));
                    if L::AFFINE {
                        _mm512_store_ps(self.mins.as_mut_ptr().add(place), L::Scales::mins_512(unit, block, part));
                    }
                }
            }
        }
    }
}

/// A tile of rows times a panel, along some blocks.
struct Chunk {
    blocks: usize,
    row_codes: *const u8,
    row_scales: *const f32,
    row_sums: *const f32,
    codes: *const u8,
    scales: *const f32,
    mins: *const f32,
    /// Start from what C holds instead of zero.
    accumulate: bool,
    c: *mut f32,
    c_stride: usize,
    rows: usize,
    columns: __mmask16,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add_chunk<T: Tiles, L: Layout>(tiles: &mut T, underway: *mut i32, chunk: &Chunk) {
    let parts = L::PARTS;
    let steps = chunk.blocks * parts;
    let mut sums = [_mm512_setzero_ps(); LANES];
    // SAFETY: `multiply` made the chunk of buffers that hold its blocks; C has these rows and columns; each step reads
    // the integer sums that `start` wrote for it.
    unsafe {
        for step in 0..steps.min(UNDERWAY) {
            start::<T, L>(tiles, underway, chunk, step);
        }
        if chunk.accumulate {
            for (row, sum) in sums.iter_mut().enumerate() {
                if row < chunk.rows {
                    *sum = _mm512_maskz_loadu_ps(chunk.columns, chunk.c.add(row * chunk.c_stride));
                }
            }
        }
        for step in 0..steps {
            let products = underway.add(step % UNDERWAY * SUMS);
            let block = step / parts * LANES;
            let scales = _mm512_load_ps(chunk.scales.add(step * LANES));
            for (row, sum) in sums.iter_mut().enumerate() {
                let product = _mm512_cvtepi32_ps(_mm512_load_si512(products.add(row * LANES).cast()));
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(chunk.row_scales.add(block + row).read()));
                *sum = _mm512_fmadd_ps(product, scale, *sum);
            }
            if L::AFFINE {
                let mins = _mm512_load_ps(chunk.mins.add(step * LANES));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let row_sum = _mm512_set1_ps(chunk.row_sums.add(step * LANES + row).read());
                    *sum = _mm512_fnmadd_ps(mins, row_sum, *sum);
                }
            }
            if step + UNDERWAY < steps {
                start::<T, L>(tiles, underway, chunk, step + UNDERWAY);
            }
        }
        for (row, sum) in sums.into_iter().enumerate() {
            if row < chunk.rows {
                _mm512_mask_storeu_ps(chunk.c.add(row * chunk.c_stride), chunk.columns, sum);
            }
        }
    }
}

/// Multiplies the codes of a step and sends the sums off. Neighbours take different tiles, so that none waits.
#[inline(always)]
unsafe fn start<T: Tiles, L: Layout>(tiles: &mut T, underway: *mut i32, chunk: &Chunk, step: usize) {
    // SAFETY: handed on.
    unsafe {
        match step % 4 {
            0 => start_with::<T, L, 0, 4, 6>(tiles, underway, chunk, step),
            1 => start_with::<T, L, 1, 5, 7>(tiles, underway, chunk, step),
            2 => start_with::<T, L, 2, 4, 6>(tiles, underway, chunk, step),
            _ => start_with::<T, L, 3, 5, 7>(tiles, underway, chunk, step),
        }
    }
}

#[inline(always)]
unsafe fn start_with<T: Tiles, L: Layout, const SUM: u8, const A: u8, const B: u8>(
    tiles: &mut T,
    underway: *mut i32,
    chunk: &Chunk,
    step: usize,
) {
    let parts = L::PARTS;
    // SAFETY: the step's block is one of the chunk's, and `underway` holds `UNDERWAY` tiles.
    unsafe {
        let rows = chunk.row_codes.add(step / parts * BLOCK_BYTES + step % parts * (BLOCK / parts));
        tiles.zero::<SUM>();
        tiles.load::<A>(rows, BLOCK);
        tiles.load::<B>(chunk.codes.add(step * (BLOCK_BYTES / parts)), ROW_BYTES);
        tiles.multiply_bytes::<SUM, A, B>();
        tiles.store::<SUM>(underway.add(step % UNDERWAY * SUMS).cast(), ROW_BYTES);
    }
}
