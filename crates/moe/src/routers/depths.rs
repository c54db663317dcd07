//! Mixture-of-Depths (Raposo et al. 2024): a block runs on the C = ⌈ρ S⌉ highest scored tokens of each sequence alone; they
//! get x + r · f(x), r = w · x their score, the others pass unchanged. f gives the block's increment
//! (attention and feed-forward part without the residual) and sees only the chosen tokens, with their own positions,
//! so a cache of keys holds the chosen alone.
//!
//! The choice by rank looks ahead. Two causal samplers stand in for it when decoding: `Threshold`, the score itself,
//! trained by [`sampler_loss`] so that σ(r) > ½ means chosen; `Predictor`, a small network on x cut off from the
//! tape, trained by the same loss without touching the model. `Random` chooses blindly, as the paper's control does.

use super::math::{pick, scalar, scale_rows, sigmoid};
use super::selection::{capacity, top_k};
use crate::MoeError;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};

/// How tokens are chosen when they come one by one.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one a block")]
pub enum CausalSampler {
    /// σ(r) > ½, the score trained to say so.
    Threshold,
    /// A network of its own: relu(x · inner) · outer.
    Predictor {
        /// `[width, hidden]`
        inner: Param,
        /// `[1, width]`
        outer: Param,
    },
    /// By lot, whatever the token: for comparison.
    Random,
}

/// Routes tokens around a block.
#[derive(Debug)]
pub struct MixtureOfDepths {
    /// `[1, hidden]`
    weight: Param,
    share: f64,
    sampler: CausalSampler,
}

/// What was chosen, and what it came to.
#[derive(Clone, Debug)]
pub struct DepthDecision {
    /// Tokens that the block ran on, rising.
    pub chosen: Vec<usize>,
    /// The sampler's loss (binary cross entropy); its coefficient is the caller's.
    pub sampler_loss: Var,
    /// Share of tokens about which the causal sampler agrees with the choice by rank.
    pub agreement: f32,
}

impl MixtureOfDepths {
    /// A router for `share` of each sequence's tokens.
    ///
    /// # Shapes
    /// weight `[1, hidden]`.
    ///
    /// # Errors
    /// A share outside 0 to 1.
    pub fn new(weight: Param, share: f64, sampler: CausalSampler) -> Result<Self, MoeError> {
        let [_, _] = weight.dims()?;
        if share > 0.0 && share <= 1.0 {
            Ok(Self { weight, share, sampler })
        } else {
            let message = format!("wanted more than 0 and at most 1, found {share}");
            Err(MoeError::Option { router: "depths", key: "capacity".into(), message })
        }
    }

    /// Its weights.
    pub fn params(&self) -> Vec<&Param> {
        let mut all = vec![&self.weight];
        if let CausalSampler::Predictor { inner, outer } = &self.sampler {
            all.extend([inner, outer]);
        }
        all
    }

    /// Its weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all = vec![&mut self.weight];
        if let CausalSampler::Predictor { inner, outer } = &mut self.sampler {
            all.extend([inner, outer]);
        }
        all
    }

    /// The causal sampler's logits, `[tokens]`: a token is taken when its own is above zero.
    fn sample<'p>(&'p self, g: &Graph<'p>, x: &Var, scores: &Var) -> Result<Var, MoeError> {
        Ok(match &self.sampler {
            CausalSampler::Threshold | CausalSampler::Random => scores.clone(),
            CausalSampler::Predictor { inner, outer } => {
                let inner = ops::linear_f32(g, &x.detach(), inner)?;
                let inner = super::math::map(g, &inner, |v| v.max(0.0), |v| f32::from(u8::from(v > 0.0)));
                ops::linear_f32(g, &inner, outer)?
            }
        })
    }

    /// Chooses by rank within each sequence (training): sees the future.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`; `starts` as in [`super::Context::starts`]; `seed` decides what is drawn by lot.
    /// `block` gets the chosen rows and which tokens they are, and gives their increments.
    ///
    /// # Errors
    /// Less than one token a sequence, or the block's.
    pub fn forward<'p, E: From<MoeError>>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        starts: &[usize],
        seed: u64,
        block: impl FnOnce(&Graph<'p>, &Var, &[usize]) -> Result<Var, E>,
    ) -> Result<(Var, DepthDecision), E> {
        let scores = ops::router_logits(g, x, &self.weight).map_err(MoeError::from)?;
        let mut ranks = scores.data().to_vec();
        if matches!(self.sampler, CausalSampler::Random) {
            Rng::new(seed).fill_uniform(&mut ranks, 0.0, 1.0);
        }
        let whole = [0, scores.data().len()];
        let starts = if starts.len() < 2 { &whole[..] } else { starts };
        let mut chosen = Vec::new();
        for bounds in starts.windows(2) {
            let mine = &ranks[bounds[0]..bounds[1]];
            let take = capacity("depths", self.share, 1, mine.len(), 1)?.min(mine.len());
            let mut best = top_k(mine, take);
            best.sort_unstable();
            chosen.extend(best.into_iter().map(|t| bounds[0] + t));
        }
        self.run(g, x, &scores, chosen, block)
    }

    /// Chooses each token by itself (decoding).
    ///
    /// # Shapes
    /// As [`MixtureOfDepths::forward`]; positions `[tokens]`, each token's place in its sequence.
    ///
    /// # Errors
    /// The block's.
    pub fn forward_causal<'p, E: From<MoeError>>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        positions: &[u32],
        block: impl FnOnce(&Graph<'p>, &Var, &[usize]) -> Result<Var, E>,
    ) -> Result<(Var, DepthDecision), E> {
        let scores = ops::router_logits(g, x, &self.weight).map_err(MoeError::from)?;
        let logits = self.sample(g, x, &scores)?;
        let drawn = |position: u32| f64::from(Rng::new(u64::from(position)).uniform()) < self.share;
        let takes = |t: usize| match self.sampler {
            CausalSampler::Random => drawn(positions[t]),
            CausalSampler::Threshold | CausalSampler::Predictor { .. } => logits.data()[t] > 0.0,
        };
        let chosen = (0..logits.data().len()).filter(|&t| takes(t)).collect();
        self.run(g, x, &scores, chosen, block)
    }

    fn run<'p, E: From<MoeError>>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        scores: &Var,
        chosen: Vec<usize>,
        block: impl FnOnce(&Graph<'p>, &Var, &[usize]) -> Result<Var, E>,
    ) -> Result<(Var, DepthDecision), E> {
        let logits = self.sample(g, x, scores)?;
        let (mut sampler_loss, agreement) = sampler_loss(g, &logits, &chosen);
        if matches!(self.sampler, CausalSampler::Random) {
            // Nothing is to be guessed.
            sampler_loss = Var::constant(Tensor::scalar(0.0));
        }
        if chosen.is_empty() {
            return Ok((x.clone(), DepthDecision { chosen, sampler_loss, agreement }));
        }
        let hidden = x.shape()[1];
        let at = chosen.iter().flat_map(|t| t * hidden..(t + 1) * hidden).collect();
        let rows = reshape(g, &pick(g, x, at), &[chosen.len(), hidden]);
        let increments = block(g, &rows, &chosen)?;
        let weighted = scale_rows(g, &increments, &pick(g, scores, chosen.clone()))?;
        let y = add_at(g, x, &weighted, chosen.clone());
        Ok((y, DepthDecision { chosen, sampler_loss, agreement }))
    }
}

/// Mean binary cross entropy of logits `[tokens]` with "was chosen" as target, and the share of right guesses.
pub fn sampler_loss<'p>(g: &Graph<'p>, logits: &Var, chosen: &[usize]) -> (Var, f32) {
    let tokens = logits.data().len().max(1) as f32;
    let mut targets = vec![0.0; logits.data().len()];
    chosen.iter().for_each(|&t| targets[t] = 1.0);
    let shares = sigmoid(&Graph::inference(g.precision()), &logits.detach());
    let softplus = |v: f32| f64::from(v.max(0.0) + (-v.abs()).exp().ln_1p());
    let pairs = || logits.data().iter().zip(&targets);
    let value = pairs().map(|(&v, &t)| softplus(v) - f64::from(v * t)).sum::<f64>() / f64::from(tokens);
    let right = pairs().filter(|&(&v, &t)| (v > 0.0) == (t > 0.5)).count() as f32 / tokens;
    let slopes = shares.data().iter().zip(&targets).map(|(s, t)| (s - t) / tokens).collect();
    (scalar(g, value, vec![(logits, slopes)]), right)
}

fn reshape<'p>(g: &Graph<'p>, x: &Var, shape: &[usize]) -> Var {
    let to_x = x.place();
    g.record_from(&[x], Tensor::new(shape, Buffer::from_slice(x.data())), move |dy, back| back.give(to_x, dy))
}

/// x with `rows` added at the tokens `at`.
fn add_at<'p>(g: &Graph<'p>, x: &Var, rows: &Var, at: Vec<usize>) -> Var {
    let hidden = x.shape()[1];
    let mut sum = Buffer::from_slice(x.data());
    for (&t, row) in at.iter().zip(rows.data().chunks_exact(hidden)) {
        sum[t * hidden..(t + 1) * hidden].iter_mut().zip(row).for_each(|(s, r)| *s += r);
    }
    let (to_x, to_rows) = (x.place(), rows.place());
    g.record_from(&[x, rows], Tensor::new(x.shape(), sum), move |dy, back| {
        let mine = at.iter().flat_map(|t| dy[t * hidden..(t + 1) * hidden].to_vec()).collect::<Buffer<f32>>();
        back.give(to_rows, mine);
        back.give(to_x, dy);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::Gradients;
    use moebius_testkit::check_gradient;

    fn router(share: f64) -> MixtureOfDepths {
        let weight = Param::new(0, "w", Tensor::new(&[1, 2], vec![1.0, 0.5]));
        MixtureOfDepths::new(weight, share, CausalSampler::Threshold).unwrap()
    }

    const X: [f32; 8] = [2.0, 0.0, -1.0, 0.4, 0.5, 1.2, -0.6, -1.0];

    #[test]
    fn the_best_of_each_sequence_go_through() {
        let (router, g) = (router(0.5), Graph::inference(Precision::F32));
        let x = Var::constant(Tensor::new(&[4, 2], X.to_vec()));
        let (y, decision) = router
            .forward::<MoeError>(&g, &x, &[0, 2, 4], 0, |_, rows, tokens| {
                assert_eq!((rows.data(), tokens), (&[2.0, 0.0, 0.5, 1.2][..], &[0, 2][..]));
                Ok(Var::constant(Tensor::new(&[2, 2], vec![1.0; 4])))
            })
            .unwrap();
        // Scores 2, -0.8, 1.1, -1.1.
        assert_eq!(decision.chosen, [0, 2]);
        for (found, wanted) in y.data().iter().zip([4.0, 2.0, -1.0, 0.4, 1.6, 2.3, -0.6, -1.0]) {
            assert!((found - wanted).abs() < 1e-6);
        }
        // Each score's sign already says what was chosen: decoding takes the same tokens.
        assert_eq!(decision.agreement, 1.0);
        let one =
            |_: &Graph<'_>, rows: &Var, _: &[usize]| Ok::<_, MoeError>(Var::constant(Tensor::zeros(rows.shape())));
        assert_eq!(router.forward_causal(&g, &x, &[0, 1, 0, 1], one).unwrap().1.chosen, [0, 2]);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let run = |x: &[f32], w: &[f32], gradients: Option<&mut Gradients>| {
            let mut router = router(0.5);
            router.weight.update(|weight| weight.copy_from_slice(w));
            let g = Graph::training(Precision::F32);
            let x = g.variable(Tensor::new(&[4, 2], x.to_vec()));
            let (y, decision) = router
                .forward::<MoeError>(&g, &x, &[], 0, |g, rows, _| {
                    Ok(super::super::math::map(g, rows, |v| v * v, |v| 2.0 * v))
                })
                .unwrap();
            let slopes: Vec<f32> = (0..8).map(|i| i as f32 / 4.0 - 0.9).collect();
            let value = y.data().iter().zip(&slopes).map(|(y, s)| f64::from(y * s)).sum();
            let loss = ops::sum(&g, &[&scalar(&g, value, vec![(&y, slopes)]), &decision.sampler_loss]);
            let found = f64::from(loss.data()[0]);
            let dx = gradients.map(|gradients| g.backward(&loss, gradients).get(&x).unwrap().to_vec());
            (found, dx)
        };
        let (w, mut gradients) = ([1.0, 0.5], Gradients::new());
        let dx = run(&X, &w, Some(&mut gradients)).1.unwrap();
        check_gradient("x", &X, &dx, |x| run(x, &w, None).0);
        check_gradient("w", &w, gradients.get(0).unwrap(), |w| run(&X, w, None).0);
    }

    #[test]
    fn a_predictor_learns_the_choice_without_touching_x() {
        let mut w = vec![0.0; 16];
        moebius_tensor::Rng::new(1).fill_normal(&mut w, 0.7);
        let sampler = CausalSampler::Predictor {
            inner: Param::new(1, "inner", Tensor::new(&[8, 2], w)),
            outer: Param::new(2, "outer", Tensor::new(&[1, 8], vec![0.1; 8])),
        };
        let mut router =
            MixtureOfDepths::new(Param::new(0, "w", Tensor::new(&[1, 2], vec![1.0, 0.5])), 0.5, sampler).unwrap();
        let mut agreement = 0.0;
        for _ in 0..300 {
            let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
            let x = g.variable(Tensor::new(&[4, 2], X.to_vec()));
            let (_, decision) = router.forward::<MoeError>(&g, &x, &[], 0, |_, rows, _| Ok(rows.clone())).unwrap();
            agreement = decision.agreement;
            assert!(g.backward(&decision.sampler_loss, &mut gradients).get(&x).is_none());
            for param in router.params_mut() {
                let Some(gradient) = gradients.get(param.id()) else { continue };
                param.update(|w| w.iter_mut().zip(gradient).for_each(|(w, d)| *w -= 0.3 * d));
            }
        }
        assert_eq!(agreement, 1.0);
    }

    #[test]
    fn a_lot_takes_its_share_and_looks_at_nothing() {
        let weight = Param::new(0, "w", Tensor::zeros(&[1, 2]));
        let router = MixtureOfDepths::new(weight, 0.25, CausalSampler::Random).unwrap();
        let g = Graph::training(Precision::F32);
        let x = Var::constant(Tensor::zeros(&[400, 2]));
        let chosen = |seed| {
            let (_, decision) =
                router.forward::<MoeError>(&g, &x, &[0, 200, 400], seed, |_, rows, _| Ok(rows.clone())).unwrap();
            assert_eq!((decision.chosen.len(), decision.sampler_loss.data()), (100, &[0.0][..]));
            decision.chosen
        };
        assert_eq!(chosen(1), chosen(1));
        assert_ne!(chosen(1), chosen(2));
        let positions: Vec<u32> = (0..400).collect();
        let causal = router.forward_causal::<MoeError>(&g, &x, &positions, |_, rows, _| Ok(rows.clone())).unwrap().1;
        assert!((70..130).contains(&causal.chosen.len()), "{}", causal.chosen.len());
    }

    #[test]
    fn shares_out_of_range_are_refused() {
        let refuse = |share| {
            let weight = Param::new(0, "w", Tensor::zeros(&[1, 2]));
            MixtureOfDepths::new(weight, share, CausalSampler::Threshold).unwrap_err().to_string()
        };
        assert_eq!(refuse(0.0), "router depths: option capacity: wanted more than 0 and at most 1, found 0");
        let (router, g) = (router(0.1), Graph::inference(Precision::F32));
        let x = Var::constant(Tensor::zeros(&[4, 2]));
        let error = router.forward::<MoeError>(&g, &x, &[], 0, |_, rows, _| Ok(rows.clone())).unwrap_err();
        assert!(error.to_string().contains("wanted at least 1"), "{error}");
    }
}
