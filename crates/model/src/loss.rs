//! The training objective: next-token cross entropy, and the losses on routing.

use crate::{Batch, Model, ModelError, Observer};
use moebius_moe::routers::DepthDecision;
use moebius_moe::{LoadStatistics, Routing, load_balancing_loss, load_balancing_loss_over, z_loss};
use moebius_tensor::{Graph, Var, ops};

/// What is added to the cross entropy, and how memory is spent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSettings<'a> {
    /// Weight of the load-balancing loss (the mean over layers).
    pub balance_coefficient: f32,
    /// Weight of the router's z-loss.
    pub z_coefficient: f32,
    /// Whether layers recompute their activations in the backward: less memory, a third more work.
    pub recompute: bool,
    /// Whose choices the load-balancing loss counts.
    pub counted: Counted<'a>,
}

/// Whose choices the load-balancing loss counts. Loads stand layer by layer, those with experts only.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Counted<'a> {
    /// Those of the batch.
    #[default]
    Batch,
    /// Those of the batch and of others before it; none before the first.
    Since(&'a [LoadStatistics]),
    /// All of these, the batch's among them.
    All(&'a [LoadStatistics]),
}

impl Counted<'_> {
    /// The load-balancing loss of layer `index`.
    fn loss<'p>(self, g: &Graph<'p>, index: usize, layer: &Routing) -> Var {
        let (mut load, adds) = match self {
            Self::Batch => return load_balancing_loss(g, &[layer]),
            Self::Since(loads) => (loads.get(index).cloned().unwrap_or_default(), true),
            Self::All(loads) => (loads.get(index).cloned().unwrap_or_default(), false),
        };
        if adds {
            load.add(&layer.plan);
        }
        load_balancing_loss_over(g, layer, &load)
    }
}

/// The objective and its parts.
#[derive(Debug)]
pub struct Loss {
    /// Cross entropy plus weighted routing losses: what is differentiated.
    pub total: Var,
    /// Mean cross entropy of a token in nats.
    pub cross_entropy: f32,
    /// The load-balancing loss, unweighted; about the number of experts a token when even. Zero in dense models.
    pub balance: f32,
    /// The z-loss, unweighted. Zero in dense models.
    pub z: f32,
    /// The routing methods' own losses, each with its coefficient, the mean over layers, and the loss of the samplers of
    /// Mixture-of-Depths.
    pub method: f32,
    /// What each MoE layer's router decided.
    pub routing: Vec<Routing>,
    /// What each router of attention heads decided.
    pub mixer_routing: Vec<Routing>,
    /// Which tokens went through each layer that has a router around it.
    pub depths: Vec<DepthDecision>,
}

/// The mean of the layers' own load-balancing losses. Pooled over layers, as transformers counts, the loss is content when
/// every layer sends all to a few experts as long as the layers choose different ones, and small models do: after 1000
/// steps of `recipes/tiny.toml` the fullest expert of a layer had 3.5 times the mean (4 is the most possible), with a
/// layer's own loss 1.3 times (validation loss 3.398 pooled, 3.404 by layer; one seed each).
fn mean_balance<'p>(g: &Graph<'p>, layers: &[&Routing], counted: Counted<'_>) -> Var {
    let each: Vec<Var> = layers.iter().enumerate().map(|(index, layer)| counted.loss(g, index, layer)).collect();
    let share = 1.0 / each.len().max(1) as f32;
    ops::weighted_sum(g, &each.iter().map(|loss| (share, loss)).collect::<Vec<_>>())
}

/// The mean over layers of what their routing methods ask for, and over those with a router around them of its sampler's
/// loss; none if nobody asks.
fn mean_method<'p>(g: &Graph<'p>, layers: &[&Routing], depths: &[DepthDecision], sampler_weight: f32) -> Option<Var> {
    let share = 1.0 / layers.len().max(1) as f32;
    let asked = layers.iter().flat_map(|layer| &layer.losses).filter(|loss| loss.coefficient != 0.0);
    let mut terms: Vec<(f32, &Var)> = asked.map(|loss| (share * loss.coefficient, &loss.value)).collect();
    let share = sampler_weight / depths.len().max(1) as f32;
    terms.extend(depths.iter().filter(|_| share != 0.0).map(|depth| (share, &depth.sampler_loss)));
    (!terms.is_empty()).then(|| ops::weighted_sum(g, &terms))
}

#[derive(Default)]
struct Collected {
    routing: Vec<Routing>,
    mixer_routing: Vec<Routing>,
    depths: Vec<DepthDecision>,
}

impl Observer for Collected {
    fn routing(&mut self, _: usize, routing: &Routing) {
        self.routing.push(routing.clone());
    }

    fn mixer_routing(&mut self, _: usize, routing: &Routing) {
        self.mixer_routing.push(routing.clone());
    }

    fn depth(&mut self, _: usize, decision: &DepthDecision) {
        self.depths.push(decision.clone());
    }
}

impl Model {
    /// The objective of a batch.
    ///
    /// # Shapes
    /// targets `[tokens]`: the id that should follow each token; `u32::MAX` counts for nothing.
    ///
    /// # Errors
    /// A token, target or position that the model lacks.
    pub fn loss<'p>(
        &'p self,
        g: &Graph<'p>,
        batch: &Batch,
        targets: &[u32],
        settings: &LossSettings<'_>,
    ) -> Result<Loss, ModelError> {
        let (position, vocabulary) =
            (|&target: &u32| target != u32::MAX && target as usize >= self.config.vocab_size, self.config.vocab_size);
        if let Some(position) = targets.iter().position(position) {
            return Err(ModelError::Token { token: targets[position], position, vocabulary });
        }
        let mut collected = Collected::default();
        let hidden = self.forward_with(g, batch, None, &mut collected, settings.recompute && g.is_recording())?;
        let cross_entropy =
            ops::linear_cross_entropy_biased(g, &self.head_input(g, &hidden), self.head(), self.head_bias(), targets)?;
        let Collected { routing, mixer_routing, depths } = collected;
        let layers: Vec<&Routing> = routing.iter().collect();
        let routers: Vec<&Routing> = routing.iter().chain(&mixer_routing).collect();
        let (balance, z) = (mean_balance(g, &routers, settings.counted), z_loss(g, &routers));
        let sampler_weight = self.config.depths.map_or(0.0, |depths| depths.sampler_loss as f32);
        let method = mean_method(g, &layers, &depths, sampler_weight);
        let mut terms = vec![(1.0, &cross_entropy)];
        terms.extend(method.as_ref().map(|method| (1.0, method)));
        for (coefficient, loss) in [(settings.balance_coefficient, &balance), (settings.z_coefficient, &z)] {
            if coefficient != 0.0 {
                terms.push((coefficient, loss));
            }
        }
        let total = ops::weighted_sum(g, &terms);
        let value = |loss: &Var| loss.data()[0];
        let method = method.as_ref().map_or(0.0, value);
        Ok(Loss {
            cross_entropy: value(&cross_entropy),
            balance: value(&balance),
            z: value(&z),
            method,
            total,
            routing,
            mixer_routing,
            depths,
        })
    }
}
