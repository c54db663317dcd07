//! Rotary position embedding (Su et al. 2021, "RoFormer"). A head's first features turn, in pairs; those behind them stay.
//!
//! Legend: `tokens` rows, `heads` heads of `head_dim` features each, `dims` features of a head that turn.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, rows_mut};

/// Which features of a head turn together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + dims / 2`, as in Hugging Face's Llama and Mixtral.
    #[default]
    Halves,
    /// `2 i` and `2 i + 1`, as in the paper.
    Neighbours,
}

/// Cosines and sines of every position's angles.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    pairs: RopePairs,
}

impl RopeTable {
    /// The table for positions `0..max_positions`, with the angles `position * theta^(-2 i / dims)`, halves apart.
    pub fn new(theta: f64, dims: usize, max_positions: usize) -> Self {
        assert!(dims.is_multiple_of(2), "rope needs an even number of features, found {dims}");
        let frequencies: Vec<f32> =
            (0..dims / 2).map(|i| (1.0 / theta.powf(2.0 * i as f64 / dims as f64)) as f32).collect();
        Self::of_frequencies(&frequencies, 1.0, RopePairs::Halves, max_positions)
    }

    /// The table for positions `0..max_positions`, with the angles `position * frequency`; cosines and sines are
    /// multiplied with `magnitude`.
    ///
    /// As in transformers, the frequencies and the angles are rounded to f32; the functions of the angles are then
    /// computed in f64.
    ///
    /// # Shapes
    /// `frequencies` `[dims / 2]`.
    pub fn of_frequencies(frequencies: &[f32], magnitude: f32, pairs: RopePairs, max_positions: usize) -> Self {
        let angles = (0..max_positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let scaled = |x: f64| x as f32 * magnitude;
        let (cos, sin) = angles.map(|angle| (scaled(angle.cos()), scaled(angle.sin()))).unzip();
        Self { cos, sin, half: frequencies.len(), pairs }
    }

    /// How many positions the table holds.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }

    /// The features of a head that turn.
    pub fn dims(&self) -> usize {
        2 * self.half
    }

    /// The cosines and sines of one position, `[dims / 2]` each.
    pub fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let range = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Turns each head of each token by its position's angles, in place; `inverse` turns back (the gradient of the turn).
///
/// # Shapes
/// `x` `[tokens, heads * head_dim]`, `positions` `[tokens]`.
pub fn rope(x: &mut [f32], heads: usize, head_dim: usize, positions: &[u32], table: &RopeTable, inverse: bool) {
    rope_on(Isa::current(), x, [heads, head_dim], positions, table, inverse);
}

fn rope_on(
    isa: Isa,
    x: &mut [f32],
    [heads, head_dim]: [usize; 2],
    positions: &[u32],
    table: &RopeTable,
    inverse: bool,
) {
    let width = heads * head_dim;
    assert!(table.dims() <= head_dim, "a head has {head_dim} features, {} are to turn", table.dims());
    assert_eq!(x.len(), positions.len() * width);
    let x = DisjointMut::new(x);
    for_each_block(positions.len(), width, |tokens| {
        // SAFETY: blocks of tokens are disjoint.
        let x = unsafe { rows_mut(&x, &tokens, width) };
        dispatch(isa, Turn { x, width, head_dim, positions: &positions[tokens], table, inverse });
    });
}

struct Turn<'a> {
    x: &'a mut [f32],
    /// Features of a token.
    width: usize,
    head_dim: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
    inverse: bool,
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let dims = self.table.dims();
        for (token, &position) in self.x.chunks_exact_mut(self.width).zip(self.positions) {
            let (cos, sin) = self.table.row(position);
            for head in token.chunks_exact_mut(self.head_dim) {
                let head = &mut head[..dims];
                match self.table.pairs {
                    RopePairs::Halves => turn_halves(simd, head, cos, sin, self.inverse),
                    RopePairs::Neighbours => turn_neighbours(head, cos, sin, self.inverse),
                }
            }
        }
    }
}

#[inline(always)]
fn turn_halves<S: Simd>(simd: S, head: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
    let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
    let sign = Lanes::splat(simd, if inverse { -1.0 } else { 1.0 });
    let (first, second) = head.split_at_mut(head.len() / 2);
    let angles = cos.chunks(LANES).zip(sin.chunks(LANES));
    for ((first, second), (cos, sin)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).zip(angles) {
        let (cos, sin) = (load(cos), load(sin) * sign);
        let (a, b) = (load(first), load(second));
        // Products and sums are rounded apart, as in transformers.
        (a * cos - b * sin).store_any(first);
        (b * cos + a * sin).store_any(second);
    }
}

/// The compiler makes vectors of this loop.
#[inline(always)]
fn turn_neighbours(head: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
    let sign = if inverse { -1.0 } else { 1.0 };
    for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let ([a, b], sin) = (*pair, sin * sign);
        *pair = [a * cos - b * sin, b * cos + a * sin];
    }
}

/// The plain loop that [`rope`] is compared with.
pub fn rope_reference(
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    positions: &[u32],
    table: &RopeTable,
    inverse: bool,
) {
    assert_eq!(x.len(), positions.len() * heads * head_dim);
    let half = table.dims() / 2;
    for (token, &position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
        let (cos, sin) = table.row(position);
        for head in token.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let sin = if inverse { -sin[i] } else { sin[i] };
                let (first, second) = match table.pairs {
                    RopePairs::Halves => (i, i + half),
                    RopePairs::Neighbours => (2 * i, 2 * i + 1),
                };
                let (a, b) = (head[first], head[second]);
                head[first] = a * cos[i] - b * sin;
                head[second] = b * cos[i] + a * sin;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check, numbers};

    #[test]
    fn turns_are_the_reference_and_turn_back() {
        for (tokens, heads, head_dim) in [(0, 2, 4), (1, 1, 2), (9, 3, 6), (70, 8, 32), (5, 2, 80), (33, 4, 128)] {
            let whole = RopeTable::new(10_000.0, head_dim, 300);
            let frequencies: Vec<f32> = (0..head_dim.div_ceil(4)).map(|i| 1.0 / (i as f32 + 1.0)).collect();
            let part = |pairs| RopeTable::of_frequencies(&frequencies, 1.0, pairs, 300);
            for table in [whole, part(RopePairs::Halves), part(RopePairs::Neighbours)] {
                let positions: Vec<u32> = (0..tokens).map(|token| (token * 37 % 300) as u32).collect();
                let x = &numbers(1, tokens * heads * head_dim + 1)[1..];
                let mut reference = x.to_vec();
                rope_reference(&mut reference, heads, head_dim, &positions, &table, false);
                check(&[reference], 1e-6, |isa| {
                    let mut x = x.to_vec();
                    rope_on(isa, &mut x, [heads, head_dim], &positions, &table, false);
                    vec![x]
                });
                let mut back = x.to_vec();
                rope(&mut back, heads, head_dim, &positions, &table, false);
                rope(&mut back, heads, head_dim, &positions, &table, true);
                assert_close("back", &back, x, 1e-6);
            }
        }
    }

    #[test]
    fn neighbours_turn_by_the_magnitude_too() {
        let table = RopeTable::of_frequencies(&[1.0, 0.5], 2.0, RopePairs::Neighbours, 2);
        let mut x = [1.0, 0.0, 0.0, 1.0, 7.0];
        rope(&mut x, 1, 5, &[1], &table, false);
        let wanted = [2.0 * 1f32.cos(), 2.0 * 1f32.sin(), -2.0 * 0.5f32.sin(), 2.0 * 0.5f32.cos(), 7.0];
        assert_close("x", &x, &wanted, 1e-6);
    }

    #[test]
    fn position_one_turns_by_the_first_frequency() {
        let table = RopeTable::new(100.0, 4, 2);
        let mut x = [1.0, 1.0, 0.0, 0.0];
        rope(&mut x, 1, 4, &[1], &table, false);
        assert_close("x", &x, &[1f32.cos(), 0.1f32.cos(), 1f32.sin(), 0.1f32.sin()], 1e-6);
    }
}
