//! AdamW, Muon and SGD over all parameters of a model, with the state that a checkpoint carries.
//!
//! Weight decay is decoupled in all three: a weight shrinks by `rate * decay` a step. It acts on matrices: attention,
//! experts, routers, output head. It leaves alone vectors (norms, biases) and the token embedding, whose rare rows
//! would shrink at every step that does not see them; with tied embeddings the shared matrix counts as the embedding.
//! `[optimizer.groups]` says otherwise where wanted.

use moebius_kernels::gemm::Precision;
use moebius_kernels::memory::Buffer;
use moebius_kernels::momentum::{Momentum, descend, momentum};
use moebius_kernels::optimizer::{AdamW, adamw};
use moebius_kernels::orthogonal::orthogonalise;
use moebius_tensor::{Gradients, Param};

use crate::recipe::{Group, OptimizerKind, OptimizerSection};

/// The state of every parameter, by parameter id, and the constants of the recipe.
pub struct Optimizer {
    settings: OptimizerSection,
    precision: Precision,
    moments: Vec<Moments>,
}

/// What is remembered of one parameter's gradients.
pub struct Moments {
    /// Adam's `m`, the running mean of the gradient; in Muon and SGD the momentum.
    pub first: Buffer<f32>,
    /// Adam's `v`, the running mean of the gradient's square; empty in Muon and SGD.
    pub second: Buffer<f32>,
}

/// What one step needs besides gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSettings {
    /// The number of the step, from 1.
    pub step: u64,
    /// The learning rate.
    pub rate: f64,
    /// What every gradient is multiplied with first: averaging and clipping in one.
    pub gradient_scale: f64,
}

/// The kinds of weights that a recipe can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// The token embedding.
    Embedding,
    /// The output projection.
    Head,
    /// Norms and biases.
    Vectors,
    /// Projections of attention.
    Attention,
    /// Routers.
    Router,
    /// Experts.
    Experts,
    /// Dense feed-forward parts.
    FeedForward,
}

impl WeightKind {
    /// The kind of a weight, by its name and shape.
    pub fn of(param: &Param) -> Self {
        let last = param.name().rsplit('.').next().unwrap_or_default();
        match (param.name(), param.shape().len()) {
            (_, 0 | 1) => Self::Vectors,
            (name, _) if name.contains("embed") => Self::Embedding,
            ("head", _) => Self::Head,
            _ if last.starts_with("router") => Self::Router,
            (_, 3) => Self::Experts,
            (name, _) if name.contains("attention") => Self::Attention,
            _ => Self::FeedForward,
        }
    }

    /// Whether Muon moves it. Jordan leaves embeddings and heads to AdamW; a router's rows are scores of their own, whose
    /// sizes mean something, so it stays there too.
    fn has_muon(self) -> bool {
        matches!(self, Self::Attention | Self::Experts | Self::FeedForward)
    }
}

impl Optimizer {
    /// A state of zeros for `params`; Muon's products are computed in `precision`.
    pub fn new(settings: &OptimizerSection, precision: Precision, params: &[&Param]) -> Self {
        let moments = params.iter().map(|param| {
            let len = param.value().data().len();
            let second = if method(settings.kind, param) == OptimizerKind::AdamW { len } else { 0 };
            Moments { first: Buffer::zeroed(len), second: Buffer::zeroed(second) }
        });
        Self { settings: settings.clone(), precision, moments: moments.collect() }
    }

    /// The state, by parameter id.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The state, by parameter id, to be filled from a checkpoint.
    pub fn moments_mut(&mut self) -> &mut [Moments] {
        &mut self.moments
    }

    /// Moves every parameter against its gradient. A parameter without gradient has one of zero: its moments fade and
    /// its weights decay, the same whether or not an earlier step of this process gave it one.
    pub fn step(&mut self, params: Vec<&mut Param>, gradients: &mut Gradients, step: &StepSettings) {
        for param in params {
            let gradient = gradients.get_mut(param.id(), param.n_elements());
            match method(self.settings.kind, param) {
                OptimizerKind::AdamW => self.adamw(param, gradient, step),
                OptimizerKind::Muon => self.muon(param, gradient, step),
                OptimizerKind::Sgd => self.sgd(param, gradient, step),
            }
        }
    }

    /// The weight decay of a parameter, and its rate.
    fn constants(&self, param: &Param, step: &StepSettings) -> [f64; 2] {
        let kind = WeightKind::of(param);
        let groups = &self.settings.groups;
        let (group, general): (&Group, f64) = match kind {
            WeightKind::Embedding => (&groups.embedding, 0.0),
            WeightKind::Head => (&groups.head, self.settings.weight_decay),
            WeightKind::Vectors => (&groups.vectors, 0.0),
            WeightKind::Attention => (&groups.attention, self.settings.weight_decay),
            WeightKind::Router => (&groups.router, self.settings.weight_decay),
            WeightKind::Experts => (&groups.experts, self.settings.weight_decay),
            WeightKind::FeedForward => (&groups.feed_forward, self.settings.weight_decay),
        };
        [group.weight_decay.unwrap_or(general), step.rate * group.learning_rate_factor]
    }

    fn adamw(&mut self, param: &mut Param, gradient: &[f32], step: &StepSettings) {
        let [decay, rate] = self.constants(param, step);
        let settings = AdamW {
            lr: rate as f32,
            beta1: self.settings.beta1 as f32,
            beta2: self.settings.beta2 as f32,
            eps: self.settings.epsilon as f32,
            weight_decay: decay as f32,
            step: step.step,
            grad_scale: step.gradient_scale as f32,
        };
        let Moments { first, second } = &mut self.moments[param.id()];
        param.update(|weights| adamw(weights, gradient, first, second, &settings));
    }

    /// The momentum's update, which the caller may change before it is subtracted.
    fn update(&mut self, param: &Param, gradient: &[f32], step: &StepSettings) -> Buffer<f32> {
        let settings = Momentum {
            decay: self.settings.momentum() as f32,
            nesterov: self.settings.nesterov(),
            grad_scale: step.gradient_scale as f32,
        };
        let mut update = Buffer::scratch(gradient.len());
        momentum(gradient, &mut self.moments[param.id()].first, &mut update, &settings);
        update
    }

    fn sgd(&mut self, param: &mut Param, gradient: &[f32], step: &StepSettings) {
        let [decay, rate] = self.constants(param, step);
        let update = self.update(param, gradient, step);
        param.update(|weights| descend(weights, &update, (1.0 - rate * decay) as f32, rate as f32));
    }

    /// The orthogonalised momentum, times `0.2 sqrt(max(rows, columns))`: then a number of the update is about as large
    /// as one of AdamW's, and rates and decays carry over (Liu et al. 2025, "Muon is scalable for LLM training").
    fn muon(&mut self, param: &mut Param, gradient: &[f32], step: &StepSettings) {
        let [decay, rate] = self.constants(param, step);
        let [.., rows, cols] = *param.shape() else { unreachable!("vectors are AdamW's") };
        // Gate and up stand in one matrix, but are two.
        let is_two = param.name().ends_with("gate_up") && rows.is_multiple_of(2);
        let rows = if is_two { rows / 2 } else { rows };
        let mut update = self.update(param, gradient, step);
        orthogonalise(self.precision, &mut update, rows, cols);
        let scaled = rate * 0.2 * (rows.max(cols) as f64).sqrt();
        param.update(|weights| descend(weights, &update, (1.0 - rate * decay) as f32, scaled as f32));
    }
}

/// What moves a parameter.
fn method(kind: OptimizerKind, param: &Param) -> OptimizerKind {
    match kind {
        OptimizerKind::Muon if !WeightKind::of(param).has_muon() => OptimizerKind::AdamW,
        kind => kind,
    }
}

/// The factor by which a mean gradient of norm `norm` is cut to `limit` (Pascanu et al. 2013; PyTorch's
/// `clip_grad_norm_`, with its 1e-6).
pub fn clip_factor(norm: f64, limit: f64) -> f64 {
    (limit / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use moebius_tensor::Tensor;

    use super::*;

    #[test]
    fn clipping_on_paper() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert!((clip_factor(4.0, 1.0) * 4.0 - 1.0).abs() < 1e-6);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
    }

    fn param(id: usize, name: &str, shape: &[usize]) -> Param {
        let len = shape.iter().product::<usize>();
        Param::new(id, name, Tensor::new(shape, vec![1.0; len]))
    }

    #[test]
    fn kinds_by_name_and_shape() {
        use WeightKind::*;
        for (name, shape, wanted) in [
            ("embedding", &[9, 4][..], Embedding),
            ("head", &[9, 4], Head),
            ("layers.0.attention_norm", &[4], Vectors),
            ("layers.0.attention.q", &[4, 4], Attention),
            ("layers.0.attention.q_bias", &[4], Vectors),
            ("layers.0.moe.router", &[3, 4], Router),
            ("layers.0.moe.gate_up", &[3, 8, 4], Experts),
            ("layers.0.mlp.down", &[4, 8], FeedForward),
        ] {
            assert_eq!(WeightKind::of(&param(0, name, shape)), wanted, "{name}");
        }
    }

    /// One step of gradient 1 from weight 1, rate 0.1.
    fn after_a_step(settings: &str, name: &str, shape: &[usize]) -> Vec<f32> {
        let settings: OptimizerSection = toml::from_str(settings).unwrap();
        let mut param = param(0, name, shape);
        let mut optimizer = Optimizer::new(&settings, Precision::F32, &[&param]);
        let mut gradients = Gradients::new();
        gradients.get_mut(0, param.n_elements()).fill(1.0);
        let step = StepSettings { step: 1, rate: 0.1, gradient_scale: 1.0 };
        optimizer.step(vec![&mut param], &mut gradients, &step);
        param.value().data().to_vec()
    }

    /// The first step of Adam moves by the rate, that of SGD by the rate times the gradient; decay takes 0.1 of a tenth.
    #[test]
    fn steps_on_paper() {
        let router = "layers.0.moe.router";
        let one = |settings, name, shape: &[usize]| after_a_step(settings, name, shape)[0];
        let close = |found: f32, wanted: f32| assert!((found - wanted).abs() < 1e-5, "{found} for {wanted}");
        close(one("", router, &[2, 2]), 0.99 - 0.1);
        close(one("", "final_norm", &[2]), 1.0 - 0.1);
        close(one("kind = 'sgd'", router, &[2, 2]), 0.99 - 0.1);
        close(one("kind = 'sgd'\nnesterov = true", router, &[2, 2]), 0.99 - 0.19);
        close(one("kind = 'sgd'\n[groups.router]\nlearning_rate_factor = 2.0", router, &[2, 2]), 0.98 - 0.2);
        close(one("kind = 'sgd'\n[groups.router]\nweight_decay = 0.0", router, &[2, 2]), 1.0 - 0.1);
        close(one("kind = 'sgd'\n[groups.vectors]\nweight_decay = 0.5", "final_norm", &[2]), 0.95 - 0.1);
        // Muon leaves the router to AdamW.
        close(one("kind = 'muon'", router, &[2, 2]), 0.99 - 0.1);
    }

    /// A matrix of ones has one singular value; made orthogonal each of its r x c entries is about 1 / sqrt(r c). Gate and
    /// up are two matrices.
    #[test]
    fn muon_moves_a_matrix_by_its_singular_vectors() {
        for (name, shape, rows, cols) in
            [("layers.0.attention.q", &[4, 8][..], 4, 8), ("layers.0.moe.gate_up", &[2, 8, 4], 4, 4)]
        {
            let change = 0.99 - after_a_step("kind = 'muon'", name, shape)[0];
            let wanted = 0.1 * 0.2 * (rows.max(cols) as f32).sqrt() / ((rows * cols) as f32).sqrt();
            assert!((0.65..1.25).contains(&(change / wanted)), "{name}: {change} for {wanted}");
        }
    }
}
