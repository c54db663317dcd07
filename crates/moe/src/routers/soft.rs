//! Soft MoE (Puigcerver et al. 2023): no token is sent anywhere; each expert computes on slots that are weighted means of
//! all tokens. ℓ = x̂ · (scale · Φ̂), x̂ and the slots' vectors Φ̂ of length 1; dispatch D = softmax of ℓ over tokens, slot inputs
//! Dᵀ x; combine = softmax of ℓ over all slots. Everything has a gradient, nothing is dropped or balanced. The result of a
//! token depends on all tokens of its group: not for causal models.

use super::math::softmax;
use crate::{ExpertBank, MoeError, Plan};
use moebius_kernels::gemm::{Beta, Mat, Packed, Precision, grouped_matmul, grouped_matmul_weight_gradient};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Tensor, TensorError, Var};
use std::rc::Rc;

/// Added to the squared length under the root.
const LENGTH_EPSILON: f32 = 1e-6;

/// A layer of soft slots: its own layer, since no plan of tokens can express it.
#[derive(Debug)]
pub struct SoftMoe {
    /// `[experts * slots, hidden]`
    slots: Param,
    /// `[1]`
    scale: Param,
    experts: ExpertBank,
    n_experts: usize,
}

impl SoftMoe {
    /// A layer.
    ///
    /// # Shapes
    /// slots `[experts * slots, hidden]`, expert by expert; scale `[1]`, 1 at the start.
    ///
    /// # Errors
    /// Other shapes, or no slot for some expert.
    pub fn new(slots: Param, scale: Param, experts: ExpertBank, n_experts: usize) -> Result<Self, MoeError> {
        let [n_slots, _] = slots.value().dims()?;
        if n_experts == 0 || n_slots == 0 || !n_slots.is_multiple_of(n_experts) {
            let reason = format!("wanted as many slots for each of {n_experts} experts, found {n_slots} in all");
            return Err(MoeError::Refused { router: "soft", reason });
        }
        if scale.shape() != [1] {
            let found = scale.shape().to_vec();
            return Err(TensorError::Shape { what: "soft router's scale", wanted: vec![1], found }.into());
        }
        Ok(Self { slots, scale, experts, n_experts })
    }

    /// Its weights.
    pub fn params(&self) -> Vec<&Param> {
        [&self.slots, &self.scale].into_iter().chain(self.experts.params()).collect()
    }

    /// Its weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        [&mut self.slots, &mut self.scale].into_iter().chain(self.experts.params_mut()).collect()
    }

    /// The layer's answer to one group of tokens, all of which see each other.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    ///
    /// # Errors
    /// Another width of x.
    pub fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Var, MoeError> {
        self.forward_groups(g, x, 1)
    }

    /// As [`SoftMoe::forward`] for `groups` groups of as many tokens each, as images are: tokens see their own group.
    ///
    /// # Shapes
    /// x and result `[groups * tokens, hidden]`, group by group.
    ///
    /// # Errors
    /// Another width of x, or tokens that the groups do not share evenly.
    pub fn forward_groups<'p>(&'p self, g: &Graph<'p>, x: &Var, groups: usize) -> Result<Var, MoeError> {
        let [n_slots, hidden] = self.slots.value().dims()?;
        let [rows, width] = x.dims()?;
        if width != hidden || groups == 0 || !rows.is_multiple_of(groups) {
            let (wanted, found) = (vec![groups, hidden], vec![rows, width]);
            return Err(TensorError::Shape { what: "soft layer's input", wanted, found }.into());
        }
        let (slots, scale) = (weight(g, &self.slots), weight(g, &self.scale));
        let cosines = times(g, &unit_rows(g, x)?, &transposed(g, &unit_rows(g, &slots)?, 1)?, 1)?;
        let logits = times_scalar(g, &cosines, &scale);
        // [groups * slots, tokens]: softmax over tokens.
        let dispatch = softmax(g, &transposed(g, &logits, groups)?)?;
        let inputs = times(g, &dispatch, x, groups)?;
        let each = n_slots / self.n_experts;
        let choices: Vec<u32> = (0..groups * n_slots).map(|slot| (slot % n_slots / each) as u32).collect();
        let plan = Rc::new(Plan::from_choices(self.n_experts, 1, &choices)?);
        let ones = Var::constant(Tensor::new(&[choices.len()], vec![1.0; choices.len()]));
        let outputs = self.experts.forward(g, &inputs, &plan, &ones)?;
        times(g, &softmax(g, &logits)?, &outputs, groups)
    }
}

/// A weight as a value whose gradient returns to it.
fn weight<'p>(g: &Graph<'p>, param: &'p Param) -> Var {
    g.record(param.value().clone(), move |dw, back| back.give_weight(param, dw))
}

/// Each of `groups` matrices `[rows, cols]`, one below the other, turned.
fn transpose(x: &[f32], groups: usize, rows: usize, cols: usize) -> Buffer<f32> {
    let mut turned = Buffer::scratch(groups * rows * cols);
    for (x, turned) in x.chunks_exact((rows * cols).max(1)).zip(turned.chunks_exact_mut((rows * cols).max(1))) {
        for (r, row) in x.chunks_exact(cols).enumerate() {
            row.iter().enumerate().for_each(|(c, &value)| turned[c * rows + r] = value);
        }
    }
    turned
}

fn transposed<'p>(g: &Graph<'p>, x: &Var, groups: usize) -> Result<Var, MoeError> {
    let [all, cols] = x.dims()?;
    let (to_x, rows) = (x.place(), all / groups);
    let output = Tensor::new(&[groups * cols, rows], transpose(x.data(), groups, rows, cols));
    Ok(g.record_from(&[x], output, move |dy, back| back.give(to_x, transpose(&dy, groups, cols, rows))))
}

/// a `[groups * m, k]` · b `[groups * k, n]` group by group, f32 whatever the graph's precision.
fn times<'p>(g: &Graph<'p>, a: &Var, b: &Var, groups: usize) -> Result<Var, MoeError> {
    let ([a_rows, k], [_, n]) = (a.dims()?, b.dims()?);
    let m = a_rows / groups;
    let offsets: Vec<usize> = (0..=groups).map(|group| group * m).collect();
    let mut y = Buffer::scratch(a_rows * n);
    product(a.data(), [a_rows, k], &matrices(b.data(), k, n), &offsets, &mut y);
    let output = Tensor::new(&[a_rows, n], y);
    let (to_a, to_b, a_value, b_value) = (a.place(), b.place(), a.value().clone(), b.value().clone());
    Ok(g.record_from(&[a, b], output, move |dy, back| {
        if back.wants(to_a) {
            let turned: Vec<Mat<'_>> = matrices(b_value.data(), k, n).into_iter().map(Mat::t).collect();
            let mut da = Buffer::scratch(a_rows * k);
            product(&dy, [a_rows, n], &turned, &offsets, &mut da);
            back.give(to_a, da);
        }
        if back.wants(to_b) {
            // Aᵀ dY of each group, as a weight's gradient is.
            let mut db = Buffer::scratch(b_value.data().len());
            let (a, dy) = (Mat::new(a_value.data(), a_rows, k), Mat::new(&dy, a_rows, n));
            grouped_matmul_weight_gradient(Precision::F32, a, dy, &offsets, &mut db, Beta::Overwrite);
            back.give(to_b, db);
        }
    }))
}

/// The matrices `[k, n]` that stand one below the other.
fn matrices(b: &[f32], k: usize, n: usize) -> Vec<Mat<'_>> {
    b.chunks_exact((k * n).max(1)).map(|b| Mat::new(b, k, n)).collect()
}

/// The rows of each group of a `[rows, k]` times that group's matrix.
fn product(a: &[f32], [rows, k]: [usize; 2], b: &[Mat<'_>], offsets: &[usize], y: &mut [f32]) {
    let packed = Packed::pack_many(Precision::F32, b);
    grouped_matmul(Mat::new(a, rows, k), offsets, &packed, y, Beta::Overwrite);
}

fn times_scalar<'p>(g: &Graph<'p>, x: &Var, factor: &Var) -> Var {
    let f = factor.data()[0];
    let output = Tensor::new(x.shape(), x.data().iter().map(|x| f * x).collect::<Buffer<f32>>());
    let (to_x, to_factor, x_value) = (x.place(), factor.place(), x.value().clone());
    g.record_from(&[x, factor], output, move |mut dy, back| {
        let slope = dy.iter().zip(x_value.data()).map(|(d, x)| d * x).sum();
        back.give(to_factor, Buffer::from_slice(&[slope]));
        dy.iter_mut().for_each(|d| *d *= f);
        back.give(to_x, dy);
    })
}

/// Rows of length 1, nearly.
fn unit_rows<'p>(g: &Graph<'p>, x: &Var) -> Result<Var, MoeError> {
    let [_, cols] = x.dims()?;
    let inverse = |row: &[f32]| 1.0 / (row.iter().map(|v| v * v).sum::<f32>() + LENGTH_EPSILON).sqrt();
    let inverses: Vec<f32> = x.data().chunks_exact(cols).map(inverse).collect();
    let unit = x.data().iter().enumerate().map(|(i, v)| v * inverses[i / cols]).collect::<Buffer<f32>>();
    let output = Tensor::new(x.shape(), unit);
    let (to_x, unit) = (x.place(), output.clone());
    Ok(g.record_from(&[x], output, move |mut dy, back| {
        for ((d, unit), inverse) in dy.chunks_exact_mut(cols).zip(unit.data().chunks_exact(cols)).zip(&inverses) {
            let along: f32 = d.iter().zip(unit).map(|(d, u)| d * u).sum();
            d.iter_mut().zip(unit).for_each(|(d, u)| *d = (*d - along * u) * inverse);
        }
        back.give(to_x, dy);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_tensor::{Gradients, Rng};
    use moebius_testkit::check_gradient;

    const SHAPES: [&[usize]; 5] = [&[4, 5], &[6, 5], &[1], &[3, 4, 5], &[3, 5, 2]];

    fn random(seed: u64) -> Vec<Tensor> {
        let fill = |(i, shape): (usize, &&[usize])| {
            let mut data = vec![0.0; shape.iter().product()];
            Rng::new(seed + i as u64).fill_normal(&mut data, 1.0);
            Tensor::new(shape, data)
        };
        SHAPES.iter().enumerate().map(fill).collect()
    }

    fn layer(all: &[Tensor]) -> SoftMoe {
        let param = |id: usize| Param::new(id, format!("w{id}"), all[id + 1].clone());
        SoftMoe::new(param(0), param(1), ExpertBank::new(param(2), param(3)).unwrap(), 3).unwrap()
    }

    fn objective<'p>(g: &Graph<'p>, layer: &'p SoftMoe, x: &Var) -> Var {
        let y = layer.forward(g, x).unwrap();
        let slopes: Vec<f32> = (0..y.data().len()).map(|i| ((i * 7 % 11) as f32 - 5.0) / 5.0).collect();
        let value = y.data().iter().zip(&slopes).map(|(y, s)| f64::from(y * s)).sum();
        super::super::math::scalar(g, value, vec![(&y, slopes)])
    }

    #[test]
    fn gradients_match_finite_differences() {
        let all = random(5);
        let soft = layer(&all);
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let x = g.variable(all[0].clone());
        let loss = objective(&g, &soft, &x);
        let leaves = g.backward(&loss, &mut gradients);
        let at = |all: &[Tensor]| {
            let layer = layer(all);
            f64::from(objective(&Graph::inference(Precision::F32), &layer, &Var::constant(all[0].clone())).data()[0])
        };
        for i in 0..all.len() {
            let gradient = if i == 0 { leaves.get(&x) } else { gradients.get(i - 1) };
            check_gradient(&format!("{i}"), all[i].data(), gradient.unwrap(), |moved| {
                let mut all = all.clone();
                all[i] = Tensor::new(SHAPES[i], moved.to_vec());
                at(&all)
            });
        }
    }

    #[test]
    fn groups_do_not_see_each_other() {
        let all = random(8);
        let soft = layer(&all);
        let g = Graph::inference(Precision::F32);
        let forward = |x: &[f32], groups: usize| {
            let x = Var::constant(Tensor::new(&[x.len() / 5, 5], x.to_vec()));
            soft.forward_groups(&g, &x, groups).unwrap().data().to_vec()
        };
        let (first, second) = (all[0].data(), all[1].data());
        let both = [first, &second[..20]].concat();
        let alone = [forward(first, 1), forward(&second[..20], 1)].concat();
        moebius_testkit::same_bits("two groups", &forward(&both, 2), &alone);
        let odd = Var::constant(Tensor::zeros(&[5, 5]));
        assert!(soft.forward_groups(&g, &odd, 2).is_err());
    }

    #[test]
    fn permuted_tokens_give_permuted_answers() {
        let all = random(8);
        let soft = layer(&all);
        let g = Graph::inference(Precision::F32);
        let y = soft.forward(&g, &Var::constant(all[0].clone())).unwrap();
        let turned = all[0].data().chunks_exact(5).rev().flatten().copied().collect::<Vec<f32>>();
        let z = soft.forward(&g, &Var::constant(Tensor::new(&[4, 5], turned))).unwrap();
        for (y, z) in y.data().chunks_exact(5).zip(z.data().chunks_exact(5).rev()) {
            assert!(y.iter().zip(z).all(|(y, z)| (y - z).abs() < 1e-5));
        }
    }

    #[test]
    fn one_token_is_every_slot() {
        // Softmax over one token is 1, so each slot holds the token itself, whatever Φ.
        let mut all = random(3);
        all[0] = Tensor::new(&[1, 5], vec![0.5, -1.0, 2.0, 0.0, 1.0]);
        let x = Var::constant(all[0].clone());
        // Equal experts: combine weights sum to one, so what is left is the answer of one.
        for tensor in &mut all[3..] {
            let size = tensor.data().len() / 3;
            let one = tensor.data()[..size].to_vec();
            tensor.data_mut().chunks_exact_mut(size).for_each(|expert| expert.copy_from_slice(&one));
        }
        let soft = layer(&all);
        let g = Graph::inference(Precision::F32);
        let equal = soft.forward(&g, &x).unwrap();
        let plan = Rc::new(Plan::from_choices(3, 1, &[0]).unwrap());
        let alone = soft.experts.forward(&g, &x, &plan, &Var::constant(Tensor::new(&[1], vec![1.0]))).unwrap();
        assert!(equal.data().iter().zip(alone.data()).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn uneven_slots_are_refused() {
        let all = random(1);
        let param = |id: usize| Param::new(id, "w", all[id + 1].clone());
        let error = SoftMoe::new(param(0), param(1), ExpertBank::new(param(2), param(3)).unwrap(), 4).unwrap_err();
        assert!(error.to_string().contains("found 6 in all"), "{error}");
    }
}
