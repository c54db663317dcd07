//! The feed-forward part of a layer: one gated network, or a mixture of them.

use crate::ModelError;
use crate::config::{Ffn, Gate, ModelConfig, MoeFfn, SharedExperts};
use crate::methods;
use crate::weights::Weights;
use moebius_moe::routers::{Context, RoutingMethod};
use moebius_moe::{ExpertBank, MoeLayer, Routing, TopKRouter};
use moebius_tensor::{Graph, Param, Var, ops};

/// One network, or several behind a router.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
pub(crate) enum FeedForward {
    Dense(Network),
    Moe(Mixture),
}

/// down · act(gate · x, up · x).
#[derive(Debug)]
pub(crate) struct Network {
    /// `[2 * width, hidden]`, the gate's rows first.
    gate_up: Param,
    /// `[hidden, width]`.
    down: Param,
    gate: Gate,
}

/// Experts behind a router, and what every token passes besides.
#[derive(Debug)]
pub(crate) struct Mixture {
    layer: Routed,
    shared: Option<Shared>,
    /// `[hidden]`.
    bias: Option<Param>,
}

/// A router and its experts.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
enum Routed {
    /// As the family has it.
    Family(MoeLayer<TopKRouter>),
    /// By a method of [`moebius_moe::routers`].
    Method(MoeLayer<Box<dyn RoutingMethod>>),
}

/// The network that every token passes.
#[derive(Debug)]
struct Shared {
    network: Network,
    /// `[1, hidden]`: scores how much of the answer counts.
    gate: Option<Param>,
}

impl FeedForward {
    pub(crate) fn build(config: &ModelConfig, ffn: &Ffn, weights: &mut Weights<'_, '_>) -> Result<Self, ModelError> {
        let hidden = config.hidden;
        match ffn {
            Ffn::Dense(dense) => weights
                .within("mlp.", |weights| Network::build(dense.width, dense.gate, hidden, weights))
                .map(Self::Dense),
            Ffn::Moe(moe) => weights.within("moe.", |weights| Mixture::build(config, moe, weights)).map(Self::Moe),
        }
    }

    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        context: &Context<'_>,
    ) -> Result<(Var, Option<Routing>), ModelError> {
        match self {
            Self::Dense(network) => Ok((network.forward(g, x)?, None)),
            Self::Moe(mixture) => {
                let (y, routing) = mixture.forward(g, x, context)?;
                Ok((y, Some(routing)))
            }
        }
    }

    /// The routing method, if one stands for the family's router.
    pub(crate) fn method_mut(&mut self) -> Option<&mut dyn RoutingMethod> {
        match self {
            Self::Moe(Mixture { layer: Routed::Method(layer), .. }) => Some(&mut layer.router),
            Self::Dense(_) | Self::Moe(_) => None,
        }
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        match self {
            Self::Dense(network) => network.params(),
            Self::Moe(mixture) => mixture.params(),
        }
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        match self {
            Self::Dense(network) => network.params_mut(),
            Self::Moe(mixture) => mixture.params_mut(),
        }
    }
}

impl Network {
    fn build(width: usize, gate: Gate, hidden: usize, weights: &mut Weights<'_, '_>) -> Result<Self, ModelError> {
        let gate_up = weights.get("gate_up", &[2 * width, hidden])?;
        Ok(Self { gate_up, down: weights.get("down", &[hidden, width])?, gate })
    }

    fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Var, ModelError> {
        let inner = ops::gated(g, &ops::linear(g, x, &self.gate_up)?, self.gate)?;
        Ok(ops::linear(g, &inner, &self.down)?)
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.gate_up, &self.down]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.gate_up, &mut self.down]
    }
}

impl Mixture {
    fn build(config: &ModelConfig, moe: &MoeFfn, weights: &mut Weights<'_, '_>) -> Result<Self, ModelError> {
        let (hidden, shared) = (config.hidden, moe.shared);
        let build_shared = |weights: &mut Weights<'_, '_>, shared: SharedExperts| {
            weights.within("shared.", |weights| {
                let network = Network::build(shared.width, moe.gate, hidden, weights)?;
                Ok(Shared { network, gate: weights.get_if(shared.gated, "gate", &[1, hidden])? })
            })
        };
        Ok(Self {
            layer: Routed::build(config, moe, weights)?,
            shared: shared.map(|shared| build_shared(weights, shared)).transpose()?,
            bias: weights.get_if(moe.output_bias, "output_bias", &[hidden])?,
        })
    }

    fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<(Var, Routing), ModelError> {
        let (mut y, routing) = match &self.layer {
            Routed::Family(layer) => layer.forward(g, x)?,
            Routed::Method(layer) => {
                let (y, decision) = layer.forward_by(g, x, context)?;
                (y, decision.into())
            }
        };
        if let Some(Shared { network, gate }) = &self.shared {
            let mut answer = network.forward(g, x)?;
            if let Some(gate) = gate {
                let open = ops::sigmoid(g, &ops::linear_f32(g, x, gate)?);
                answer = ops::scale_rows(g, &answer, &open)?;
            }
            y = ops::add(g, &y, answer)?;
        }
        if let Some(bias) = &self.bias {
            y = ops::add_bias(g, &y, bias)?;
        }
        Ok((y, routing))
    }

    fn params(&self) -> Vec<&Param> {
        let mut all = match &self.layer {
            Routed::Family(layer) => layer.params(),
            Routed::Method(layer) => layer.router.params().into_iter().chain(layer.experts.params()).collect(),
        };
        if let Some(Shared { network, gate }) = &self.shared {
            all.extend(network.params());
            all.extend(gate);
        }
        all.extend(&self.bias);
        all
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all = match &mut self.layer {
            Routed::Family(layer) => layer.params_mut(),
            Routed::Method(layer) => layer.router.params_mut().into_iter().chain(layer.experts.params_mut()).collect(),
        };
        if let Some(Shared { network, gate }) = &mut self.shared {
            all.extend(network.params_mut());
            all.extend(gate);
        }
        all.extend(&mut self.bias);
        all
    }
}

impl Routed {
    fn build(config: &ModelConfig, moe: &MoeFfn, weights: &mut Weights<'_, '_>) -> Result<Self, ModelError> {
        let &MoeFfn { n_experts, router, .. } = moe;
        if let Some(method) = &config.routing {
            let layer = config.method_layer(moe);
            let router = methods::build(method, &layer, &mut |name, shape| weights.get(name, shape))?;
            let experts = experts(moe, config.hidden, weights)?;
            return Ok(Self::Method(MoeLayer::by(router, experts)));
        }
        let score = weights.get("router", &[n_experts, config.hidden])?;
        let biases = [
            weights.get_if(router.logit_bias, "router_bias", &[n_experts])?,
            weights.get_if(router.selection_bias, "selection_bias", &[n_experts])?,
        ];
        let experts = experts(moe, config.hidden, weights)?;
        Ok(Self::Family(MoeLayer { router: TopKRouter::with(score, biases, router)?, experts }))
    }
}

fn experts(moe: &MoeFfn, hidden: usize, weights: &mut Weights<'_, '_>) -> Result<ExpertBank, ModelError> {
    let &MoeFfn { n_experts, width, gate, bias, router, .. } = moe;
    let gate_up = weights.get("gate_up", &[n_experts, 2 * width, hidden])?;
    let bank = ExpertBank::new(gate_up, weights.get("down", &[n_experts, hidden, width])?)?
        .with_gate(gate)
        .weighing_input(router.weighs_input);
    if !bias {
        return Ok(bank);
    }
    let gate_up_bias = weights.get("gate_up_bias", &[n_experts, 2, width])?;
    Ok(bank.with_biases(gate_up_bias, weights.get("down_bias", &[n_experts, hidden])?)?)
}
