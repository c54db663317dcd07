//! [`MethodConfig`]: a method by name with its options, as recipes and configurations write it.

use super::options::MakeParam;
use super::{Options, RoutingMethod, Setup, build};
use crate::{MoeError, RouterSettings};
use moebius_tensor::{Param, Tensor};

/// A routing method and its options.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MethodConfig {
    /// A name of [`super::ALL`].
    pub name: String,
    /// What it is told.
    pub options: Options,
}

/// The layer that a method is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodLayer {
    /// Width of x.
    pub hidden: usize,
    /// Experts of the layer.
    pub experts: usize,
    /// Experts a token is meant for.
    pub top_k: usize,
    /// Ids of the vocabulary; 0 without one.
    pub vocabulary: usize,
    /// Whether later tokens must not be seen.
    pub causal: bool,
}

/// A weight of a method: its name and shape.
pub type MethodWeight = (String, Vec<usize>);

/// Stands for the width of x while weights are listed; no number of experts equals it.
const ANY_WIDTH: usize = (1 << 32) + 15;

impl MethodConfig {
    /// The method, its weights made by `param` from name and shape.
    ///
    /// # Errors
    /// An unknown name or option, a value out of range, a combination that is known to be wrong; `param`'s.
    pub fn build(&self, layer: &MethodLayer, param: &mut MakeParam<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
        let mut setup = Setup::new(layer.hidden, layer.experts, layer.top_k, param);
        (setup.vocabulary, setup.causal, setup.options) = (layer.vocabulary, layer.causal, self.options.clone());
        build(&self.name, &mut setup)
    }

    /// The weights that [`MethodConfig::build`] would ask for, in its order; so it also says whether the method can be
    /// built at all, without memory for weights.
    ///
    /// # Errors
    /// As [`MethodConfig::build`].
    pub fn weights(&self, layer: &MethodLayer) -> Result<Vec<MethodWeight>, MoeError> {
        self.sketch(layer).map(|(weights, _)| weights)
    }

    /// The fewest tokens of a batch with which every expert's capacity is at least one.
    ///
    /// # Errors
    /// As [`MethodConfig::build`].
    pub fn least_tokens(&self, layer: &MethodLayer) -> Result<usize, MoeError> {
        self.sketch(layer).map(|(_, method)| method.least_tokens())
    }

    /// How the method scores, chooses and weighs, if a published family's router could do the same.
    ///
    /// # Errors
    /// As [`MethodConfig::build`].
    pub fn settings(&self, layer: &MethodLayer) -> Result<Option<RouterSettings>, MoeError> {
        self.sketch(layer).map(|(_, method)| method.settings().copied())
    }

    /// What the weights would be, and the method with weights of width 1.
    fn sketch(&self, layer: &MethodLayer) -> Result<(Vec<MethodWeight>, Box<dyn RoutingMethod>), MoeError> {
        let mut all = Vec::new();
        let narrow = MethodLayer { hidden: ANY_WIDTH, ..*layer };
        let method = self.build(&narrow, &mut |name, shape| {
            let with = |width: usize| shape.iter().map(|&n| if n == ANY_WIDTH { width } else { n }).collect::<Vec<_>>();
            all.push((name.to_owned(), with(layer.hidden)));
            Ok(Param::new(0, name, Tensor::zeros(&with(1))))
        })?;
        Ok((all, method))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_listed_without_being_made() {
        let layer = MethodLayer { hidden: 1 << 40, experts: 4, top_k: 2, vocabulary: 10, causal: true };
        let of = |name: &str| MethodConfig { name: name.into(), options: Options::new() }.weights(&layer);
        let wide = |name: &str| (name.to_owned(), vec![4, 1 << 40]);
        assert_eq!(of("top_k").unwrap(), [wide("router")]);
        assert_eq!(of("noisy_top_k").unwrap(), [wide("router"), wide("router_noise")]);
        assert_eq!(of("loss_free").unwrap(), [wide("router"), ("selection_bias".to_owned(), vec![4])]);
        assert_eq!(of("hash").unwrap(), []);
        assert!(of("expert_choice").unwrap_err().to_string().contains("must not see"));
    }
}
