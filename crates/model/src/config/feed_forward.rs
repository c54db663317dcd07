//! The feed-forward part of a layer.

use moebius_kernels::gates::Gate;
use moebius_moe::RouterSettings;

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ffn {
    /// One network.
    Dense(DenseFfn),
    /// Several, of which a router chooses a few for each token.
    Moe(MoeFfn),
}

/// One gated network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DenseFfn {
    /// Its inner width.
    pub width: usize,
    /// Its non-linearity.
    pub gate: Gate,
}

/// Networks behind a router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeFfn {
    /// Networks there are.
    pub n_experts: usize,
    /// Inner width of each.
    pub width: usize,
    /// Their non-linearity, and that of the shared ones.
    pub gate: Gate,
    /// Whether both of their products have biases (gpt-oss).
    pub bias: bool,
    /// How experts are chosen and weighed.
    pub router: RouterSettings,
    /// What every token passes besides.
    pub shared: Option<SharedExperts>,
    /// Whether a bias is added to the experts' sum (JetMoE).
    pub output_bias: bool,
}

/// A network beside the chosen experts that every token passes; published models count it as several experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedExperts {
    /// Its inner width, all shared experts together.
    pub width: usize,
    /// Whether its answer is multiplied with the logistic function of a score of the token (Qwen2-MoE).
    pub gated: bool,
}

impl Ffn {
    /// One SwiGLU network.
    pub fn dense(width: usize) -> Self {
        Self::Dense(DenseFfn { width, gate: Gate::Silu })
    }

    /// SwiGLU experts behind a softmax router.
    pub fn moe_of(n_experts: usize, top_k: usize, width: usize, renormalise: bool) -> Self {
        Self::moe_with(n_experts, width, RouterSettings::softmax(top_k, renormalise), None)
    }

    /// SwiGLU experts behind a router, and what every token passes besides.
    pub fn moe_with(n_experts: usize, width: usize, router: RouterSettings, shared: Option<SharedExperts>) -> Self {
        Self::Moe(MoeFfn { n_experts, width, gate: Gate::Silu, bias: false, router, shared, output_bias: false })
    }

    /// With another non-linearity.
    #[must_use]
    pub fn with_gate(self, gate: Gate) -> Self {
        match self {
            Self::Dense(dense) => Self::Dense(DenseFfn { gate, ..dense }),
            Self::Moe(moe) => Self::Moe(MoeFfn { gate, ..moe }),
        }
    }

    /// The experts, if it has some.
    pub fn moe(&self) -> Option<&MoeFfn> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(moe) => Some(moe),
        }
    }

    /// The inner width of one network.
    pub fn width(&self) -> usize {
        match self {
            Self::Dense(DenseFfn { width, .. }) | Self::Moe(MoeFfn { width, .. }) => *width,
        }
    }
}
