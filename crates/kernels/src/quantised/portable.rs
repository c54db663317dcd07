//! The quantised products in plain loops: for any processor, and what the others are compared with.

use super::activations::Record;
use super::driver::Tile;
use super::layout::{BLOCK, LANES, Layout, Scales};

/// Rows that one call takes at most.
pub(super) const ROWS: usize = 8;

/// One panel times the rows of `tile`, at most [`ROWS`].
///
/// # Safety
/// As [`Tile`] says.
pub(super) unsafe fn multiply<L: Layout>(tile: &Tile) {
    // SAFETY: `Tile` says that the panel has these units.
    let panel = unsafe { std::slice::from_raw_parts(tile.panel, tile.units * L::UNIT_BYTES) };
    let mut sums = [[0.0f32; LANES]; ROWS];
    for (index, unit) in panel.chunks_exact(L::UNIT_BYTES).enumerate() {
        for block in 0..L::UNIT_BLOCKS {
            let codes = L::codes(unit, block);
            let scales = [0, L::PARTS - 1].map(|half| L::Scales::scales(unit, block, half));
            let mins = [0, L::PARTS - 1].map(|half| L::Scales::mins(unit, block, half));
            for (&row, sums) in tile.rows.iter().zip(&mut sums) {
                // SAFETY: `Tile` says that the rows have these records.
                let record: &Record = unsafe { &*row.add(index * L::UNIT_BLOCKS + block) };
                let mut products = [[0i32; LANES]; 2];
                for k in 0..BLOCK {
                    let half = if L::HALVES { k / (BLOCK / 2) } else { 0 };
                    for (column, product) in products[half].iter_mut().enumerate() {
                        *product += i32::from(codes[k / 4][column * 4 + k % 4]) * i32::from(record.codes[k]);
                    }
                }
                for half in 0..L::PARTS {
                    let start = if L::AFFINE_HALVES { 0 } else { record.start[half] };
                    for (column, sum) in sums.iter_mut().enumerate() {
                        let product = (products[half][column] + start) as f32;
                        *sum = product.mul_add(scales[half][column] * record.scale, *sum);
                    }
                    if L::AFFINE {
                        let part = record.part::<L>(half);
                        sums.iter_mut().zip(mins[half]).for_each(|(sum, min)| *sum = (-min).mul_add(part, *sum));
                    }
                }
            }
        }
    }
    for (row, sums) in sums[..tile.rows.len()].iter().enumerate() {
        // SAFETY: `Tile` says that C has these rows and columns, and that they are ours.
        let c = unsafe { std::slice::from_raw_parts_mut(tile.c.add(row * tile.c_stride), tile.columns) };
        c.copy_from_slice(&sums[..tile.columns]);
    }
}
