//! The training objective: next-token cross entropy, and the losses on routing.

use crate::{Batch, Model, ModelError, Observer};
use moebius_moe::{Routing, load_balancing_loss, z_loss};
use moebius_tensor::{Graph, Var, ops};

/// What is added to the cross entropy, and how memory is spent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSettings {
    /// Weight of the load-balancing loss (the mean over layers).
    pub balance_coefficient: f32,
    /// Weight of the router's z-loss.
    pub z_coefficient: f32,
    /// Whether layers recompute their activations in the backward: less memory, a third more work.
    pub recompute: bool,
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
    /// What each router decided, bottom to top.
    pub routing: Vec<Routing>,
}

/// The mean of the layers' own load-balancing losses. Pooled over layers, as transformers counts, the loss is content when
/// every layer sends all to a few experts as long as the layers choose different ones, and small models do: after 1000
/// steps of `recipes/tiny.toml` the fullest expert of a layer had 3.5 times the mean (4 is the most possible), with a
/// layer's own loss 1.3 times (validation loss 3.398 pooled, 3.404 by layer; one seed each).
fn mean_balance<'p>(g: &Graph<'p>, layers: &[&Routing]) -> Var {
    let each: Vec<Var> = layers.iter().map(|layer| load_balancing_loss(g, &[layer])).collect();
    let share = 1.0 / each.len().max(1) as f32;
    ops::weighted_sum(g, &each.iter().map(|loss| (share, loss)).collect::<Vec<_>>())
}

#[derive(Default)]
struct Collected(Vec<Routing>);

impl Observer for Collected {
    fn routing(&mut self, _: usize, routing: &Routing) {
        self.0.push(routing.clone());
    }

    fn mixer_routing(&mut self, layer: usize, routing: &Routing) {
        self.routing(layer, routing);
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
        settings: &LossSettings,
    ) -> Result<Loss, ModelError> {
        let (position, vocabulary) =
            (|&target: &u32| target != u32::MAX && target as usize >= self.config.vocab_size, self.config.vocab_size);
        if let Some(position) = targets.iter().position(position) {
            return Err(ModelError::Token { token: targets[position], position, vocabulary });
        }
        let mut collected = Collected::default();
        let hidden = self.forward_with(g, batch, None, &mut collected, settings.recompute && g.is_recording())?;
        let cross_entropy = ops::linear_cross_entropy(g, &self.head_input(g, &hidden), self.head(), targets)?;
        let routing = collected.0;
        let layers: Vec<&Routing> = routing.iter().collect();
        let (balance, z) = (mean_balance(g, &layers), z_loss(g, &layers));
        let mut terms = vec![(1.0, &cross_entropy)];
        for (coefficient, loss) in [(settings.balance_coefficient, &balance), (settings.z_coefficient, &z)] {
            if coefficient != 0.0 {
                terms.push((coefficient, loss));
            }
        }
        let total = ops::weighted_sum(g, &terms);
        let value = |loss: &Var| loss.data()[0];
        Ok(Loss { cross_entropy: value(&cross_entropy), balance: value(&balance), z: value(&z), total, routing })
    }
}
