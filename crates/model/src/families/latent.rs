//! Multi-head latent attention in the keys of DeepSeek's kind.

use super::keys::Keys;
use super::rope::{self, RopeDefaults};
use super::shared;
use crate::config::{LatentConfig, LayerConfig, Mixer, MoeFfn, Norm, NormPlace, RopePairs, RopeScaling, Scales};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

/// Added to the mean square in the norms of the latents, whatever the model has elsewhere.
const LATENT_EPS: f64 = 1e-6;

/// Reads a model of this kind, all of whose layers are mixtures so far. Without `interleaves`, neighbours turn together.
pub(super) fn read(
    keys: &Keys,
    family: &str,
    moe: MoeFfn,
    interleaves: bool,
    max_positions: usize,
) -> Result<ModelConfig, ModelError> {
    keys.only("hidden_act", json!("silu"))?;
    for (key, neutral) in
        [("attention_bias", json!(false)), ("mlp_bias", json!(false)), ("quantization_config", json!(null))]
    {
        keys.only(key, neutral)?;
    }
    let (nope_dim, rope_dim) = (keys.size("qk_nope_head_dim")?, keys.size("qk_rope_head_dim")?);
    let pairs = match !interleaves || keys.flag("rope_interleave", true)? {
        true => RopePairs::Neighbours,
        false => RopePairs::Halves,
    };
    let rope = rope::read(keys, rope_dim, RopeDefaults { pairs, ..RopeDefaults::halves(1e4) })?;
    let magnitude = match &rope.scaling {
        RopeScaling::Yarn(yarn) => yarn.magnitude(yarn.mscale_all_dim.unwrap_or(0.0)),
        _ => 1.0,
    };
    let n_heads = keys.size("num_attention_heads")?;
    keys.only("num_key_value_heads", json!(n_heads))?;
    let latent = LatentConfig {
        n_heads,
        q_rank: keys.optional_size("q_lora_rank")?,
        kv_rank: keys.size("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: keys.size("v_head_dim")?,
        rope,
        scale: (nope_dim.saturating_add(rope_dim) as f64).powf(-0.5) * magnitude * magnitude,
        eps: LATENT_EPS,
    };
    let layer = LayerConfig { mixer: Mixer::Latent(latent), ffn: Ffn::Moe(moe) };
    Ok(ModelConfig {
        family: family.into(),
        vocab_size: keys.size("vocab_size")?,
        hidden: keys.size("hidden_size")?,
        layers: vec![layer; shared::layer_count(keys)?],
        max_positions: keys.optional_size("max_position_embeddings")?.unwrap_or(max_positions),
        norm: Norm::Rms { eps: keys.number("rms_norm_eps", 1e-6)? },
        norm_place: NormPlace::Before,
        scales: Scales::default(),
        tie_embeddings: keys.flag("tie_word_embeddings", false)?,
        head_bias: false,
        last_norm: None,
        routing: None,
        depths: None,
        router_aux_loss_coef: 0.0,
        bos_token: keys.token_ids("bos_token_id")?.first().copied(),
        eos_tokens: keys.token_ids("eos_token_id")?,
    })
}

/// Writes what [`read`] reads.
pub(super) fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write_common(config);
    let latent = config.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::Latent(latent) => Some(latent),
        _ => None,
    });
    let latent = latent.expect("a family of DeepSeek's kind has latent attention");
    for (key, size) in [
        ("num_attention_heads", latent.n_heads),
        ("num_key_value_heads", latent.n_heads),
        ("kv_lora_rank", latent.kv_rank),
        ("qk_nope_head_dim", latent.nope_dim),
        ("qk_rope_head_dim", latent.rope_dim),
        ("v_head_dim", latent.value_dim),
    ] {
        map.insert(key.into(), size.into());
    }
    map.insert("q_lora_rank".into(), latent.q_rank.into());
    map.insert("rope_interleave".into(), json!(latent.rope.pairs == RopePairs::Neighbours));
    map.insert("attention_bias".into(), json!(false));
    rope::write(&latent.rope, latent.rope_dim, &mut map);
    shared::write_deepseek_experts(config, &mut map);
    map
}
