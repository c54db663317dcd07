//! Rotary position embedding (Su et al. 2021, "RoFormer"), in the half-split form of Hugging Face's Llama and Mixtral:
//! feature `i` of a head turns together with feature `i + head_dim / 2`.
//!
//! Legend: `tokens` rows, `heads` heads of `head_dim` features each.

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
    rope_reference(x, heads, head_dim, positions, table, inverse);
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
