//! The products on AMX tiles, bf16 only: two by two tiles of sums, fed by two tiles of rows and two of columns.
//!
//! A k block of a panel is one tile, and so are 16 packed rows along a k block; rows are padded to whole tiles. The
//! tests run this file on simulated tiles, so that any machine checks all but the instructions.

use super::Precision;
use super::avx512_pack::{pack_panels, pack_rows};
use super::kernels::{BlockProduct, Kernels};
use super::packed::{BLOCK_WORDS, LANES};
use crate::tiles::{Configuration, Hardware, ROW_BYTES, Tiles, WHOLE};

static WHOLE_TILES: Configuration = Configuration::new([WHOLE; 8]);

pub(super) static BF16: Kernels = Kernels {
    block_rows: 2 * LANES,
    row_multiple: LANES,
    k_blocks: 24,
    precision: Precision::Bf16,
    takes_unpacked: false,
    pack_rows: pack_rows::<true>,
    pack_panels: pack_panels::<true>,
    multiply: multiply::<Hardware>,
};

/// The same on simulated tiles, packed in plain loops.
#[cfg(test)]
pub(super) static SIMULATED: Kernels = Kernels {
    pack_rows: super::portable::pack_rows::<true>,
    pack_panels: super::portable::pack_panels::<true>,
    multiply: multiply::<crate::tiles::Simulated>,
    ..BF16
};

/// See [`Kernels::multiply`].
///
/// # Safety
/// As [`Kernels::multiply`] asks, on a machine that has `T`.
unsafe fn multiply<T: Tiles>(product: &BlockProduct) {
    // SAFETY: the machine has them; no caller of ours holds tiles.
    let mut tiles = unsafe { T::configure(&WHOLE_TILES) };
    let panels = product.columns.div_ceil(LANES);
    for panel in (0..panels).step_by(2) {
        // SAFETY: handed on; the panels are the product's.
        unsafe {
            match (product.rows > LANES, panel + 1 < panels) {
                (true, true) => sums::<T, true, true>(&mut tiles, product, panel),
                (true, false) => sums::<T, true, false>(&mut tiles, product, panel),
                (false, true) => sums::<T, false, true>(&mut tiles, product, panel),
                (false, false) => sums::<T, false, false>(&mut tiles, product, panel),
            }
        }
    }
}

/// One or two tiles of rows times one or two panels. Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
#[inline(always)]
unsafe fn sums<T: Tiles, const TWO_ROWS: bool, const TWO_PANELS: bool>(
    tiles: &mut T,
    product: &BlockProduct,
    panel: usize,
) {
    let height = if TWO_ROWS { 2 * LANES } else { LANES };
    // SAFETY: `BlockProduct` says that A holds `height` padded rows in each k block and B these panels; `Corner`
    // keeps to the rows and columns of C.
    unsafe {
        begin::<T, 0>(tiles, product, 0, panel);
        if TWO_PANELS {
            begin::<T, 1>(tiles, product, 0, panel + 1);
        }
        if TWO_ROWS {
            begin::<T, 2>(tiles, product, 1, panel);
            if TWO_PANELS {
                begin::<T, 3>(tiles, product, 1, panel + 1);
            }
        }
        let mut a = product.a.cast::<u8>();
        let mut b = product.b.add(panel * product.panel_stride).cast::<u8>();
        for _ in 0..product.k_blocks {
            tiles.load::<4>(a, ROW_BYTES);
            tiles.load::<6>(b, ROW_BYTES);
            tiles.multiply_bf16::<0, 4, 6>();
            if TWO_PANELS {
                tiles.load::<7>(b.add(4 * product.panel_stride), ROW_BYTES);
                tiles.multiply_bf16::<1, 4, 7>();
            }
            if TWO_ROWS {
                tiles.load::<5>(a.add(LANES * ROW_BYTES), ROW_BYTES);
                tiles.multiply_bf16::<2, 5, 6>();
                if TWO_PANELS {
                    tiles.multiply_bf16::<3, 5, 7>();
                }
            }
            a = a.add(height * ROW_BYTES);
            b = b.add(4 * BLOCK_WORDS);
        }
        end::<T, 0>(tiles, product, 0, panel);
        if TWO_PANELS {
            end::<T, 1>(tiles, product, 0, panel + 1);
        }
        if TWO_ROWS {
            end::<T, 2>(tiles, product, 1, panel);
            if TWO_PANELS {
                end::<T, 3>(tiles, product, 1, panel + 1);
            }
        }
    }
}

/// Where a tile of sums stands in C, and how much of it there is.
struct Corner {
    c: *mut f32,
    rows: usize,
    columns: usize,
}

impl Corner {
    /// The sums of row tile `row_tile` and panel `panel`, which the product has.
    unsafe fn new(product: &BlockProduct, row_tile: usize, panel: usize) -> Self {
        // SAFETY: the product has such rows and columns, by the caller's promise.
        let c = unsafe { product.c.add(row_tile * LANES * product.c_stride + panel * LANES) };
        let rows = LANES.min(product.rows - row_tile * LANES);
        Self { c, rows, columns: LANES.min(product.columns - panel * LANES) }
    }

    fn is_whole(&self) -> bool {
        self.rows == LANES && self.columns == LANES
    }
}

/// Sets the sums to what C holds, or zero.
#[inline(always)]
unsafe fn begin<T: Tiles, const TILE: u8>(tiles: &mut T, product: &BlockProduct, row_tile: usize, panel: usize) {
    if !product.accumulate {
        tiles.zero::<TILE>();
        return;
    }
    // SAFETY: `BlockProduct` says that C holds these rows and columns; at an edge they go through a tile in memory.
    unsafe {
        let corner = Corner::new(product, row_tile, panel);
        if corner.is_whole() {
            tiles.load::<TILE>(corner.c.cast(), 4 * product.c_stride);
            return;
        }
        let mut edge = [[0.0f32; LANES]; LANES];
        for (row, edge) in edge.iter_mut().enumerate().take(corner.rows) {
            let c = std::slice::from_raw_parts(corner.c.add(row * product.c_stride), corner.columns);
            edge[..corner.columns].copy_from_slice(c);
        }
        tiles.load::<TILE>(edge.as_ptr().cast(), ROW_BYTES);
    }
}

/// Writes the sums to C.
#[inline(always)]
unsafe fn end<T: Tiles, const TILE: u8>(tiles: &T, product: &BlockProduct, row_tile: usize, panel: usize) {
    // SAFETY: as in `begin`.
    unsafe {
        let corner = Corner::new(product, row_tile, panel);
        if corner.is_whole() {
            tiles.store::<TILE>(corner.c.cast(), 4 * product.c_stride);
            return;
        }
        let mut edge = [[0.0f32; LANES]; LANES];
        tiles.store::<TILE>(edge.as_mut_ptr().cast(), ROW_BYTES);
        for (row, edge) in edge.iter().enumerate().take(corner.rows) {
            let c = std::slice::from_raw_parts_mut(corner.c.add(row * product.c_stride), corner.columns);
            c.copy_from_slice(&edge[..corner.columns]);
        }
    }
}
