//! The eight tile registers of AMX: the instructions themselves, and (for tests) a simulation in plain loops.
//!
//! A tile holds 16 rows of 64 bytes: 16 f32, or 32 bf16. Rust has no stable intrinsics for them, hence `asm!`. No code
//! that a compiler makes uses tile registers, so what one instruction leaves in them the next one finds.

use std::arch::asm;

use super::packed::LANES;

/// Bytes of a tile's row.
pub(super) const ROW_BYTES: usize = 64;

/// Eight tiles of the current thread.
pub(super) trait Tiles {
    /// Sets all tiles up as 16 rows of 64 bytes, and takes hold of them.
    ///
    /// # Safety
    /// The machine has what the implementation needs, and nobody else on this thread holds tiles.
    unsafe fn configure() -> Self;
    /// `tilezero`
    fn zero<const TILE: u8>(&mut self);
    /// `tileloadd`: 16 rows, `stride` bytes apart.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize);
    /// `tilestored`: 16 rows, `stride` bytes apart.
    ///
    /// # Safety
    /// They are writable.
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize);
    /// `tdpbf16ps`: adds to `SUM` (f32) the product of `A` (rows of pairs along K) and `B` (pairs along K of columns).
    fn multiply<const SUM: u8, const A: u8, const B: u8>(&mut self);
}

/// The processor's tiles, held until dropped.
pub(super) struct Hardware(());

impl Tiles for Hardware {
    unsafe fn configure() -> Self {
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        /// Palette 1; the bytes of a row of each tile from byte 16 on, its rows from byte 48 on.
        static CONFIGURATION: Configuration = {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            let mut tile = 0;
            while tile < 8 {
                bytes[16 + 2 * tile] = ROW_BYTES as u8;
                bytes[48 + tile] = LANES as u8;
                tile += 1;
            }
            Configuration(bytes)
        };
        // SAFETY: a valid configuration, on a machine that has tiles and lets us use them.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION.0, options(nostack, readonly)) }
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
    fn multiply<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: configured and held.
        unsafe {
            asm!("tdpbf16ps tmm{sum}, tmm{a}, tmm{b}", sum = const SUM, a = const A, b = const B,
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

/// Tiles in memory.
#[cfg(test)]
pub(super) struct Simulated {
    tiles: Box<[[[u32; LANES]; LANES]; 8]>,
}

#[cfg(test)]
impl Tiles for Simulated {
    unsafe fn configure() -> Self {
        // Not zero: who forgets to zero a tile shall see it.
        Self { tiles: Box::new([[[0x7f7f_7f7f; LANES]; LANES]; 8]) }
    }

    fn zero<const TILE: u8>(&mut self) {
        self.tiles[TILE as usize] = [[0; LANES]; LANES];
    }

    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        for (row, words) in self.tiles[TILE as usize].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *words = unsafe { from.add(row * stride).cast::<[u32; LANES]>().read_unaligned() };
        }
    }

    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        for (row, words) in self.tiles[TILE as usize].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(row * stride).cast::<[u32; LANES]>().write_unaligned(*words) };
        }
    }

    fn multiply<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        let low = |word: u32| f32::from_bits(word << 16);
        let high = |word: u32| f32::from_bits(word & 0xffff_0000);
        for row in 0..LANES {
            for word in 0..LANES {
                let a = self.tiles[A as usize][row][word];
                for column in 0..LANES {
                    let b = self.tiles[B as usize][word][column];
                    let sum = &mut self.tiles[SUM as usize][row][column];
                    *sum = (f32::from_bits(*sum) + low(a) * low(b) + high(a) * high(b)).to_bits();
                }
            }
        }
    }
}
