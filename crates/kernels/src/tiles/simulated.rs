//! Tiles in memory, after the operation sections of Intel's Software Developer's Manual (volume 2, `LDTILECFG` to
//! `TILEZERO`), the conditions included on which the processor would refuse an instruction.

use super::{Configuration, ROW_BYTES, ROWS, Tiles};

/// Tiles in memory.
pub(crate) struct Simulated {
    tiles: Box<[[[u8; ROW_BYTES]; ROWS]; 8]>,
    /// Rows and bytes a row of each.
    shapes: [(usize, usize); 8],
}

impl Simulated {
    fn word(&self, tile: u8, row: usize, word: usize) -> u32 {
        u32::from_le_bytes(self.tiles[tile as usize][row][4 * word..][..4].try_into().unwrap())
    }

    /// Words of a row of the sums, of A and rows of the sums, once the three shapes fit each other.
    fn shape_of_product(&self, sum: u8, a: u8, b: u8) -> (usize, usize, usize) {
        assert!(sum != a && sum != b && a != b, "three different tiles");
        let [sum, a, b] = [sum, a, b].map(|tile| self.shapes[tile as usize]);
        assert!(sum.1 == b.1 && sum.0 == a.0 && a.1 == 4 * b.0, "shapes {sum:?}, {a:?}, {b:?}");
        (sum.1 / 4, a.1 / 4, sum.0)
    }

    /// Sets each word of a product's sums, given row, column and the words along K, and clears what lies beyond.
    fn set_sums(&mut self, sum: u8, a: u8, b: u8, dot: impl Fn(u32, &[(u32, u32)]) -> u32) {
        let (columns, words, rows) = self.shape_of_product(sum, a, b);
        let mut result = [[0; ROW_BYTES]; ROWS];
        for (row, result) in result.iter_mut().enumerate().take(rows) {
            for column in 0..columns {
                let pairs: Vec<_> = (0..words).map(|k| (self.word(a, row, k), self.word(b, k, column))).collect();
                let found = dot(self.word(sum, row, column), &pairs);
                result[4 * column..][..4].copy_from_slice(&found.to_le_bytes());
            }
        }
        self.tiles[sum as usize] = result;
    }
}

impl Tiles for Simulated {
    unsafe fn configure(configuration: &'static Configuration) -> Self {
        let bytes = &configuration.0;
        assert!(std::ptr::from_ref(configuration).addr().is_multiple_of(64), "one cache line");
        assert_eq!(bytes[0], 1, "palette");
        assert!(bytes[1..16].iter().chain(&bytes[32..48]).chain(&bytes[56..]).all(|&byte| byte == 0), "reserved");
        let shapes = std::array::from_fn(|tile| {
            let row_bytes = u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]) as usize;
            let rows = bytes[48 + tile] as usize;
            assert!(rows <= ROWS && row_bytes <= ROW_BYTES && row_bytes.is_multiple_of(4), "tile {tile}");
            assert_eq!(rows == 0, row_bytes == 0, "tile {tile}");
            (rows, row_bytes)
        });
        // Not zero, as the processor's would be: who forgets to zero a tile shall see it.
        Self { tiles: Box::new([[[0x7f; ROW_BYTES]; ROWS]; 8]), shapes }
    }

    fn zero<const TILE: u8>(&mut self) {
        assert_ne!(self.shapes[TILE as usize].0, 0, "a tile in use");
        self.tiles[TILE as usize] = [[0; ROW_BYTES]; ROWS];
    }

    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        let (rows, row_bytes) = self.shapes[TILE as usize];
        assert_ne!(rows, 0, "a tile in use");
        self.tiles[TILE as usize] = [[0; ROW_BYTES]; ROWS];
        for (row, bytes) in self.tiles[TILE as usize].iter_mut().enumerate().take(rows) {
            // SAFETY: the caller's promise.
            bytes[..row_bytes]
                .copy_from_slice(unsafe { std::slice::from_raw_parts(from.add(row * stride), row_bytes) });
        }
    }

    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        let (rows, row_bytes) = self.shapes[TILE as usize];
        assert_ne!(rows, 0, "a tile in use");
        for (row, bytes) in self.tiles[TILE as usize].iter().enumerate().take(rows) {
            // SAFETY: the caller's promise; source and target are different memory.
            unsafe { to.add(row * stride).copy_from_nonoverlapping(bytes.as_ptr(), row_bytes) };
        }
    }

    fn multiply_bf16<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        let flushed = |value: f32| if value.is_subnormal() { 0.0f32.copysign(value) } else { value };
        let halves = |word: u32| [word << 16, word & 0xffff_0000].map(|bits| flushed(f32::from_bits(bits)));
        self.set_sums(SUM, A, B, |start, pairs| {
            let mut sums = [0.0f32; 2];
            for &(a, b) in pairs {
                let (a, b) = (halves(a), halves(b));
                sums = std::array::from_fn(|half| flushed(a[half].mul_add(b[half], sums[half])));
            }
            flushed(flushed(f32::from_bits(start)) + flushed(sums[0] + sums[1])).to_bits()
        });
    }

    fn multiply_bytes<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        let bytes = |word: u32| word.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
        self.set_sums(SUM, A, B, |start, pairs| {
            pairs.iter().fold(start, |sum, &(a, b)| {
                let dot: i32 = bytes(a).iter().zip(bytes(b)).map(|(a, b)| a * b).sum();
                sum.wrapping_add(dot.cast_unsigned())
            })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Hardware, Shape, WHOLE};
    use super::*;
    use crate::isa::Isa;
    use crate::testing::numbers;

    static WHOLES: Configuration = Configuration::new([WHOLE; 8]);
    static PARTS: Configuration = {
        let sums = Shape { rows: 11, row_bytes: 36 };
        let (a, b) = (Shape { rows: 11, row_bytes: 20 }, Shape { rows: 5, row_bytes: 36 });
        Configuration::new([sums, sums, sums, sums, a, a, b, b])
    };

    /// Three tiles from memory, the two products in turn, and the sums back to memory, a row every 80 bytes.
    fn run<T: Tiles>(configuration: &'static Configuration, source: &[u8]) -> Vec<u8> {
        let mut result = vec![0xee; 2 * ROWS * 80];
        // SAFETY: the caller's machine has `T`; source and result hold sixteen rows of 64 bytes where they are used.
        unsafe {
            let mut tiles = T::configure(configuration);
            tiles.zero::<2>();
            tiles.load::<0>(source.as_ptr(), 64);
            tiles.load::<4>(source[1024..].as_ptr(), 68);
            tiles.load::<6>(source[2500..].as_ptr(), 64);
            tiles.multiply_bf16::<0, 4, 6>();
            tiles.multiply_bytes::<2, 4, 6>();
            tiles.multiply_bytes::<2, 4, 6>();
            tiles.store::<0>(result.as_mut_ptr(), 80);
            tiles.store::<2>(result[ROWS * 80..].as_mut_ptr(), 80);
        }
        result
    }

    /// Bytes that are bf16 of all sizes, denormals among them, but no infinities.
    fn source(seed: u64, small: bool) -> Vec<u8> {
        let words = numbers(seed, 2048);
        let scaled = |(i, x): (usize, &f32)| if small { x * 1e-19 * (1e-19 * (i % 3) as f32) } else { *x };
        words.iter().enumerate().map(scaled).flat_map(|x| (x.to_bits() >> 16).to_le_bytes()).collect()
    }

    #[test]
    fn the_processors_tiles_give_the_simulations_bits() {
        for seed in 0..8 {
            for configuration in [&WHOLES, &PARTS] {
                let source = source(seed, seed % 2 == 1);
                let simulated = run::<Simulated>(configuration, &source);
                assert!(simulated.iter().any(|&byte| byte != 0xee));
                if Isa::best() == Isa::Amx {
                    assert!(run::<Hardware>(configuration, &source) == simulated, "source {seed}");
                }
            }
        }
    }

    #[test]
    fn products_on_paper() {
        let mut source = vec![0; 4096];
        for (place, value) in [(1024, 1.5f32), (1026, 2.0), (2500, 4.0), (2502, -3.0)] {
            source[place..place + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
        }
        source[..4].copy_from_slice(&10.0f32.to_le_bytes());
        let result = run::<Simulated>(&WHOLES, &source);
        assert_eq!(result[..4], (10.0f32 + 1.5 * 4.0 - 2.0 * 3.0).to_le_bytes());
        // The bytes of 1.5, 2, 4 and -3 in bf16: 3fc0, 4000, 4080, c040.
        let dot = 2 * (0xc0 - 256) * (0x80 - 256) + 2 * 0x3f * 0x40 + 2 * 0x40 * (0xc0 - 256);
        assert_eq!(result[ROWS * 80..][..4], i32::to_le_bytes(dot));
    }

    #[test]
    #[should_panic(expected = "shapes (16, 64), (11, 20), (16, 64)")]
    fn shapes_that_do_not_fit_are_refused() {
        static MIXED: Configuration =
            Configuration::new([WHOLE, WHOLE, WHOLE, WHOLE, Shape { rows: 11, row_bytes: 20 }, WHOLE, WHOLE, WHOLE]);
        run::<Simulated>(&MIXED, &source(0, false));
    }
}
