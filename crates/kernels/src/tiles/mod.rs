//! The eight tile registers of AMX: the instructions themselves, and (for tests) a simulation in plain loops.
//!
//! A tile holds at most 16 rows of 64 bytes: 16 f32, 32 bf16 or 64 bytes. Rust has no stable intrinsics for them, hence
//! `asm!`. No code that a compiler makes uses tile registers, so what one instruction leaves in them the next one finds.

#[cfg(test)]
mod simulated;

use std::arch::asm;

#[cfg(test)]
pub(crate) use simulated::Simulated;

/// Rows of a whole tile.
pub(crate) const ROWS: usize = 16;
/// Bytes of a whole tile's row.
pub(crate) const ROW_BYTES: usize = 64;

/// A tile's rows, and the bytes of each.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: u8,
    pub(crate) row_bytes: u8,
}

/// All of a tile register.
pub(crate) const WHOLE: Shape = Shape { rows: ROWS as u8, row_bytes: ROW_BYTES as u8 };

/// The eight tiles' shapes as `ldtilecfg` reads them.
#[repr(C, align(64))]
pub(crate) struct Configuration([u8; 64]);

impl Configuration {
    /// Palette 1; the bytes of a row of each tile from byte 16 on, two bytes each, its rows from byte 48 on.
    pub(crate) const fn new(shapes: [Shape; 8]) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = shapes[tile].row_bytes;
            bytes[48 + tile] = shapes[tile].rows;
            tile += 1;
        }
        Self(bytes)
    }
}

/// Eight tiles of the current thread.
pub(crate) trait Tiles {
    /// Gives the tiles their shapes, and takes hold of them.
    ///
    /// # Safety
    /// The machine has what the implementation needs, and nobody else on this thread holds tiles.
    unsafe fn configure(configuration: &'static Configuration) -> Self;
    /// `tilezero`
    fn zero<const TILE: u8>(&mut self);
    /// `tileloadd`: the tile's rows, `stride` bytes apart.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize);
    /// `tilestored`: the tile's rows, `stride` bytes apart.
    ///
    /// # Safety
    /// They are writable.
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize);
    /// `tdpbf16ps`: adds to `SUM` (f32) the product of `A` (rows of pairs along K) and `B` (pairs along K of columns).
    /// The first and the second of the pairs are summed apart, with fused multiply-adds from zero on, then together, and
    /// then added to the sum; denormals count as zero everywhere.
    ///
    /// SUM has the rows of A and the columns of B, and A the pairs of B.
    fn multiply_bf16<const SUM: u8, const A: u8, const B: u8>(&mut self);
    /// `tdpbssd`: as [`Tiles::multiply_bf16`] with signed bytes in fours along K and sums of 32 bits, which wrap.
    fn multiply_bytes<const SUM: u8, const A: u8, const B: u8>(&mut self);
}

/// The processor's tiles, held until dropped.
pub(crate) struct Hardware(());

impl Tiles for Hardware {
    unsafe fn configure(configuration: &'static Configuration) -> Self {
        // SAFETY: a valid configuration, on a machine that has tiles and lets us use them.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &configuration.0, options(nostack, readonly)) }
        Self(())
    }

    #[inline(always)]
    fn zero<const TILE: u8>(&mut self) {
        // SAFETY: the tiles are configured and held by `self`.
        unsafe { asm!("tilezero tmm{tile}", tile = const TILE, options(nostack, nomem)) }
    }

    #[inline(always)]
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: configured and held; the caller promised the memory.
        unsafe {
            asm!("tileloadd tmm{tile}, [{from} + {stride}]", tile = const TILE, from = in(reg) from,
                stride = in(reg) stride, options(nostack, readonly))
        }
    }

    #[inline(always)]
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        // SAFETY: configured and held; the caller promised the memory.
        unsafe {
            asm!("tilestored [{to} + {stride}], tmm{tile}", tile = const TILE, to = in(reg) to,
                stride = in(reg) stride, options(nostack))
        }
    }

    #[inline(always)]
    fn multiply_bf16<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: configured and held.
        unsafe {
            asm!("tdpbf16ps tmm{sum}, tmm{a}, tmm{b}", sum = const SUM, a = const A, b = const B,
                options(nostack, nomem))
        }
    }

    #[inline(always)]
    fn multiply_bytes<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: configured and held.
        unsafe {
            asm!("tdpbssd tmm{sum}, tmm{a}, tmm{b}", sum = const SUM, a = const A, b = const B,
                options(nostack, nomem))
        }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // SAFETY: the tiles are ours; released ones cost the kernel nothing when it switches threads.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}
