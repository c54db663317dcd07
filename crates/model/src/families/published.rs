//! Which published family can express a model of our own layout, or why none can.

use super::moebius;
use crate::config::{Gate, MoeFfn};
use crate::{Ffn, ModelConfig, QkNorm};
use moebius_moe::{GroupScore, Normalise, RouterSettings, Score};

/// The configuration in the layout of a published family, whose tensors are the same weights: its own, unless that is our
/// layout and another family has the same attention, feed-forward parts and routing.
///
/// # Errors
/// Why no family has such a model, in words.
pub fn published(config: &ModelConfig) -> Result<ModelConfig, String> {
    if config.family != moebius::FAMILY.name {
        return Ok(config.clone());
    }
    if config.depths.is_some() {
        return Err("Mixture-of-Depths: no published family routes tokens around layers".into());
    }
    let is_swiglu = |layer: &crate::config::LayerConfig| match layer.ffn {
        Ffn::Dense(dense) => dense.gate == Gate::Silu,
        Ffn::Moe(moe) => moe.gate == Gate::Silu,
    };
    if !config.layers.iter().all(is_swiglu) {
        return Err("GEGLU: families are written with SwiGLU only".into());
    }
    let norm = config.attention().map_or(QkNorm::None, |attention| attention.qk_norm);
    let Some(moe) = config.moe() else {
        return match norm {
            QkNorm::None => Ok(named(config, "llama", None)),
            QkNorm::Head => Ok(named(config, "qwen3", None)),
            _ => Err("a dense model whose queries and keys are normed over all heads: no family has one".into()),
        };
    };
    let (kind, settings) = router_kind(config, moe)?;
    let family = match (kind, norm, config.dense().is_some()) {
        (Kind::Softmax, QkNorm::Head, _) => "qwen3_moe",
        (Kind::Softmax, QkNorm::Projection, false) => "olmoe",
        (Kind::Softmax, QkNorm::None, false) if settings.normalise != Normalise::None => "mixtral",
        (Kind::SigmoidWithBias, QkNorm::None | QkNorm::Head, false) => "glm4_moe",
        (Kind::Softmax, QkNorm::None, false) => {
            return Err("raw softmax weights without normed queries and keys: olmoe and qwen3_moe norm them \
                        (model.qk_norm)"
                .into());
        }
        (_, _, true) => {
            return Err("dense layers between those with experts: qwen3_moe has them, with softmax weights and each \
                        head's queries and keys normed (model.qk_norm = \"head\")"
                .into());
        }
        _ => return Err("this router with queries and keys normed over all heads: no family has both".into()),
    };
    Ok(named(config, family, Some(settings)))
}

/// The routers that families with attention as ours have.
#[derive(Clone, Copy)]
enum Kind {
    /// The best of a softmax, weights raw or over their sum.
    Softmax,
    /// DeepSeek-V3's: logistic scores, a bias for the choice.
    SigmoidWithBias,
}

/// What the router of a layer with experts does, in a family's words.
fn router_kind(config: &ModelConfig, moe: &MoeFfn) -> Result<(Kind, RouterSettings), String> {
    let mut settings = moe.router;
    if let Some(method) = &config.routing {
        let found = method.settings(&config.method_layer(moe)).map_err(|error| error.to_string())?;
        settings = found.ok_or_else(|| format!("the router `{}`: no published family has it", method.name))?;
    }
    let RouterSettings { score, selection_bias, groups, normalise, scale, .. } = settings;
    if settings.weighs_input {
        return Err("weights that multiply the experts' input: llama4_text has them beside shared experts".into());
    }
    if settings.logit_bias {
        return Err("a bias of the router's scores: gpt_oss has one, with other attention and experts".into());
    }
    if score == Score::Sigmoid && selection_bias {
        return match groups {
            Some(groups) if groups.score != GroupScore::TwoBest => {
                Err("groups by their best expert: glm4_moe judges them by the best two".into())
            }
            _ => Ok((Kind::SigmoidWithBias, settings)),
        };
    }
    match (score, selection_bias) {
        (Score::Softmax, false) => {}
        // The softmax of the chosen is the softmax of all over the chosen ones' sum.
        (Score::SoftmaxOfChosen, false) if normalise == Normalise::None => {
            settings = RouterSettings { scale, groups, ..RouterSettings::softmax(settings.top_k, true) };
        }
        _ => return Err(format!("the router's score {score:?}: no family has it with attention as here")),
    }
    if scale != 1.0 || groups.is_some() {
        return Err("scaled weights or groups of experts behind a softmax: deepseek_v2 has them, with latent \
                    attention"
            .into());
    }
    Ok((Kind::Softmax, settings))
}

fn named(config: &ModelConfig, family: &str, router: Option<RouterSettings>) -> ModelConfig {
    let mut config = ModelConfig { family: family.into(), routing: None, ..config.clone() };
    for layer in &mut config.layers {
        if let (Ffn::Moe(moe), Some(router)) = (&mut layer.ffn, router) {
            moe.router = router;
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UniformDecoder;
    use crate::config::{DepthSampler, DepthsConfig};
    use moebius_moe::routers::{MethodConfig, OptionValue};

    /// A router, its options, the norm of queries and keys, and how the reason begins.
    type Case<'a> = (&'a str, &'a [(&'a str, OptionValue)], QkNorm, &'a str);

    fn sparse(name: &str, options: &[(&str, OptionValue)], qk_norm: QkNorm) -> ModelConfig {
        let options = options.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let routing = Some(MethodConfig { name: name.into(), options });
        let ffn = Ffn::moe_of(4, 2, 16, true);
        let decoder = UniformDecoder { family: "moebius", ffn, qk_norm, n_layers: 2, ..Default::default() };
        ModelConfig { routing, ..decoder.config() }
    }

    /// A family's name, or the reason why none has it.
    fn answer(config: &ModelConfig) -> String {
        published(config).map_or_else(|reason| reason, |config| config.family)
    }

    #[test]
    fn what_a_family_can_say_is_said_so() {
        let softmax = |options: &[(&str, OptionValue)], norm| answer(&sparse("top_k", options, norm));
        assert_eq!(softmax(&[], QkNorm::None), "mixtral");
        assert_eq!(softmax(&[("balance", 0.1.into()), ("scale", 1.0.into())], QkNorm::None), "mixtral");
        assert_eq!(softmax(&[("score", "softmax_of_chosen".into())], QkNorm::None), "mixtral");
        assert_eq!(softmax(&[("renormalise", false.into())], QkNorm::Head), "qwen3_moe");
        assert_eq!(softmax(&[("renormalise", false.into())], QkNorm::Projection), "olmoe");
        let groups = [("groups", 2.0.into()), ("groups_per_token", 1.0.into()), ("scale", 2.5.into())];
        for norm in [QkNorm::None, QkNorm::Head] {
            assert_eq!(answer(&sparse("loss_free", &groups, norm)), "glm4_moe");
        }
        let mut between = sparse("top_k", &[], QkNorm::Head);
        between.layers[0].ffn = Ffn::dense(24);
        assert_eq!(answer(&between), "qwen3_moe");
        for (norm, wanted) in [(QkNorm::None, "llama"), (QkNorm::Head, "qwen3")] {
            let ffn = Ffn::dense(16);
            let decoder = UniformDecoder { family: "moebius", ffn, qk_norm: norm, ..Default::default() };
            assert_eq!(answer(&decoder.config()), wanted);
        }
    }

    #[test]
    fn the_reason_is_named_where_no_family_can() {
        let cases: [Case<'_>; 11] = [
            ("top_k", &[("renormalise", false.into())], QkNorm::None, "raw softmax weights without normed queries"),
            ("top_k", &[("scale", 2.0.into())], QkNorm::None, "scaled weights or groups"),
            ("top_k", &[("groups", 2.0.into())], QkNorm::None, "scaled weights or groups"),
            ("top_k", &[("bias", true.into())], QkNorm::None, "a bias of the router's scores"),
            ("top_k", &[("score", "sigmoid".into())], QkNorm::None, "the router's score Sigmoid"),
            ("top_k", &[("weighs_input", true.into())], QkNorm::None, "weights that multiply the experts' input"),
            ("loss_free", &[("score", "softmax".into())], QkNorm::None, "the router's score Softmax"),
            (
                "loss_free",
                &[("groups", 2.0.into()), ("group_score", "best".into())],
                QkNorm::None,
                "groups by their best expert",
            ),
            ("loss_free", &[], QkNorm::Projection, "this router with queries and keys normed over all heads"),
            ("switch", &[], QkNorm::None, "router switch: wanted 1 choices"),
            ("hash", &[], QkNorm::None, "the router `hash`: no published family has it"),
        ];
        for (name, options, norm, wanted) in cases {
            let found = answer(&sparse(name, options, norm));
            assert!(found.starts_with(wanted), "{found}");
        }
        let mut between = sparse("top_k", &[], QkNorm::None);
        between.layers[0].ffn = Ffn::dense(24);
        assert!(answer(&between).starts_with("dense layers between"), "{}", answer(&between));
        between.layers[0].ffn = Ffn::dense(24).with_gate(Gate::GeluTanh);
        assert!(answer(&between).starts_with("GEGLU: "));
        let sampler = DepthSampler::Threshold;
        let depths = Some(DepthsConfig { share: 0.5, every: 2, sampler, sampler_loss: 0.0 });
        assert!(answer(&ModelConfig { depths, ..between }).starts_with("Mixture-of-Depths: "));
    }
}
