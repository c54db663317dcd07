//! Rotary position embedding (Su et al. 2021, "RoFormer"), in the half-split form of Hugging Face's Llama and Mixtral:
//! feature `i` of a head turns together with feature `i + head_dim / 2`.
//!
//! Legend: `tokens` rows, `heads` heads of `head_dim` features each.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, rows_mut};

/// Cosines and sines of every position's angles `position * theta^(-2 i / head_dim)`.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table for positions `0..max_positions`.
    ///
    /// As in transformers, the inverse frequencies and the angles are rounded to f32; the functions of the angles are
    /// then computed in f64.
    pub fn new(theta: f64, head_dim: usize, max_positions: usize) -> Self {
        assert!(head_dim.is_multiple_of(2), "rope needs an even head_dim, found {head_dim}");
        let half = head_dim / 2;
        let inverse: Vec<f32> =
            (0..half).map(|i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32).collect();
        let angles = (0..max_positions).flat_map(|p| inverse.iter().map(move |f| f64::from(p as f32 * f)));
        let (cos, sin) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        Self { cos, sin, half }
    }

    /// How many positions the table holds.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }

    /// The features of a head that the table is made for.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// The cosines and sines of one position, `[head_dim / 2]` each.
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
    assert_eq!(table.head_dim(), head_dim);
    assert_eq!(x.len(), positions.len() * width);
    let x = DisjointMut::new(x);
    for_each_block(positions.len(), width, |tokens| {
        // SAFETY: blocks of tokens are disjoint.
        let x = unsafe { rows_mut(&x, &tokens, width) };
        dispatch(isa, Turn { x, heads, positions: &positions[tokens], table, inverse });
    });
}

struct Turn<'a> {
    x: &'a mut [f32],
    heads: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
    inverse: bool,
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let head_dim = self.table.head_dim();
        let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
        let sign = Lanes::splat(simd, if self.inverse { -1.0 } else { 1.0 });
        for (token, &position) in self.x.chunks_exact_mut(self.heads * head_dim).zip(self.positions) {
            let (cos, sin) = self.table.row(position);
            for head in token.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(head_dim / 2);
                let angles = cos.chunks(LANES).zip(sin.chunks(LANES));
                for ((first, second), (cos, sin)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).zip(angles) {
                    let (cos, sin) = (load(cos), load(sin) * sign);
                    let (a, b) = (load(first), load(second));
                    // Products and sums are rounded apart, as in transformers.
                    (a * cos - b * sin).store_any(first);
                    (b * cos + a * sin).store_any(second);
                }
            }
        }
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
    assert_eq!(table.head_dim(), head_dim);
    assert_eq!(x.len(), positions.len() * heads * head_dim);
    let half = head_dim / 2;
    for (token, &position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
        let (cos, sin) = table.row(position);
        for head in token.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            for i in 0..half {
                let sin = if inverse { -sin[i] } else { sin[i] };
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin;
                second[i] = b * cos[i] + a * sin;
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
            let table = RopeTable::new(10_000.0, head_dim, 300);
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

    #[test]
    fn position_one_turns_by_the_first_frequency() {
        let table = RopeTable::new(100.0, 4, 2);
        let mut x = [1.0, 1.0, 0.0, 0.0];
        rope(&mut x, 1, 4, &[1], &table, false);
        assert_close("x", &x, &[1f32.cos(), 0.1f32.cos(), 1f32.sin(), 0.1f32.sin()], 1e-6);
    }
}
