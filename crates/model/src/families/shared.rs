//! What the families have in common: keys and tensor names of Llama's kind.

use super::TensorMap;
use super::keys::Keys;
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

/// What transformers takes where a key is absent.
pub(super) struct Defaults {
    pub(super) rope_theta: f64,
    pub(super) rms_eps: f64,
    pub(super) max_positions: usize,
    /// As many as query heads if none. That is also what null means, whatever the family.
    pub(super) n_kv_heads: Option<usize>,
}

/// Reads the keys of Llama's kind, `window` read by the family.
pub(super) fn read(
    keys: &Keys,
    family: &str,
    ffn: Ffn,
    window: Option<usize>,
    defaults: &Defaults,
) -> Result<ModelConfig, ModelError> {
    refuse_other_arithmetic(keys, window)?;
    let (hidden, n_heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
    let head_dim = match keys.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
        None => {
            let message = format!("wanted a divisor of hidden_size {hidden}, found {n_heads}");
            return Err(keys.error("num_attention_heads", message));
        }
    };
    Ok(ModelConfig {
        family: family.into(),
        vocab_size: keys.size("vocab_size")?,
        hidden,
        n_layers: keys.size("num_hidden_layers")?,
        n_heads,
        n_kv_heads: match keys.optional_size("num_key_value_heads")? {
            Some(given) => given,
            None if keys.has("num_key_value_heads") => n_heads,
            None => defaults.n_kv_heads.unwrap_or(n_heads),
        },
        head_dim,
        max_positions: keys.optional_size("max_position_embeddings")?.unwrap_or(defaults.max_positions),
        rope_theta: read_rope_theta(keys, defaults.rope_theta)?,
        rms_eps: keys.number("rms_norm_eps", defaults.rms_eps)?,
        window,
        tie_embeddings: keys.flag("tie_word_embeddings", false)?,
        qk_norm: QkNorm::None,
        qkv_bias: false,
        ffn,
        router_aux_loss_coef: 0.0,
        bos_token: keys.token_ids("bos_token_id")?.first().copied(),
        eos_tokens: keys.token_ids("eos_token_id")?,
    })
}

/// Reads the experts of Qwen's kind; `width` names the key of their inner width. Hub files say `num_experts`,
/// transformers 5 also `num_local_experts`.
pub(super) fn read_experts(keys: &Keys, width: &str) -> Result<Ffn, ModelError> {
    let count = if keys.has("num_experts") { "num_experts" } else { "num_local_experts" };
    Ok(Ffn::Moe {
        n_experts: keys.size(count)?,
        top_k: keys.size("num_experts_per_tok")?,
        width: keys.size(width)?,
        renormalise: keys.flag("norm_topk_prob", false)?,
    })
}

/// Writes what [`read_experts`] reads, but the width.
pub(super) fn write_experts(config: &ModelConfig, map: &mut Map<String, Value>) {
    if let Ffn::Moe { n_experts, top_k, renormalise, .. } = config.ffn {
        map.insert("num_experts".into(), n_experts.into());
        map.insert("num_experts_per_tok".into(), top_k.into());
        map.insert("norm_topk_prob".into(), renormalise.into());
    }
    map.insert("router_aux_loss_coef".into(), json!(config.router_aux_loss_coef));
    map.insert("output_router_logits".into(), json!(false));
}

/// Keys that some relative of these models understands and that would change what is computed.
fn refuse_other_arithmetic(keys: &Keys, window: Option<usize>) -> Result<(), ModelError> {
    keys.only("hidden_act", json!("silu"))?;
    for key in ["attention_bias", "mlp_bias", "use_qk_norm"] {
        keys.only(key, json!(false))?;
    }
    for key in ["quantization_config", "clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"] {
        keys.only(key, Value::Null)?;
    }
    let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
    match keys.get("layer_types") {
        None => Ok(()),
        Some(Value::Array(kinds)) if kinds.iter().all(|found| found == kind) => Ok(()),
        Some(found) => Err(keys.error("layer_types", format!("wanted `{kind}` in every layer, found {found}"))),
    }
}

/// The rotary base in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
fn read_rope_theta(keys: &Keys, default: f64) -> Result<f64, ModelError> {
    let mut theta = keys.number("rope_theta", default)?;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = keys.object(name)? else { continue };
        rope.only("rope_type", json!("default"))?;
        rope.only("type", json!("default"))?;
        rope.only("partial_rotary_factor", json!(1.0))?;
        theta = rope.number("rope_theta", theta)?;
    }
    keys.only("partial_rotary_factor", json!(1.0))?;
    Ok(theta)
}

/// Writes the keys that [`read`] reads, in the spelling that both versions of transformers take.
pub(super) fn write(config: &ModelConfig) -> Map<String, Value> {
    let Value::Object(map) = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn.width(),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token,
        "eos_token_id": match config.eos_tokens[..] {
            [] => Value::Null,
            [one] => one.into(),
            ref several => several.to_vec().into(),
        },
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": true,
    }) else {
        unreachable!("the literal is an object")
    };
    map
}

/// The tensors of a decoder of Llama's kind, with `feed_forward(layer)` between attention and the next layer.
pub(super) fn tensors(config: &ModelConfig, feed_forward: impl Fn(usize) -> Vec<TensorMap>) -> Vec<TensorMap> {
    let hidden = config.hidden;
    let (queries, keys) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    let mut all = vec![matrix("model.embed_tokens", "embedding", config.vocab_size, hidden)];
    for layer in 0..config.n_layers {
        let (theirs, ours) = (format!("model.layers.{layer}"), format!("layers.{layer}"));
        all.push(vector(&format!("{theirs}.input_layernorm"), &format!("{ours}.attention_norm"), hidden));
        for (letter, rows, cols) in
            [("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)]
        {
            let name = format!("{theirs}.self_attn.{letter}_proj");
            all.push(matrix(&name, &format!("{ours}.attention.{letter}"), rows, cols));
        }
        for (letter, width) in [("q", queries), ("k", keys), ("v", keys)].into_iter().filter(|_| config.qkv_bias) {
            let ours = format!("{ours}.attention.{letter}_bias");
            let file_name = format!("{theirs}.self_attn.{letter}_proj.bias");
            all.push(TensorMap { file_name, file_shape: vec![width], param: ours, rows: 0..1 });
        }
        for (letter, heads) in [("q", config.n_heads), ("k", config.n_kv_heads)] {
            if let Some(width) = config.qk_norm.width(heads, config.head_dim) {
                let name = format!("{theirs}.self_attn.{letter}_norm");
                all.push(vector(&name, &format!("{ours}.attention.{letter}_norm"), width));
            }
        }
        all.push(vector(&format!("{theirs}.post_attention_layernorm"), &format!("{ours}.ffn_norm"), hidden));
        all.extend(feed_forward(layer));
    }
    all.push(vector("model.norm", "final_norm", hidden));
    if !config.tie_embeddings {
        all.push(matrix("lm_head", "head", config.vocab_size, hidden));
    }
    all
}

/// A whole matrix.
pub(super) fn matrix(theirs: &str, ours: &str, rows: usize, cols: usize) -> TensorMap {
    part(theirs, ours, 0, rows, cols)
}

/// `rows` rows of a (stack of) matrices, from row `first` on.
pub(super) fn part(theirs: &str, ours: &str, first: usize, rows: usize, cols: usize) -> TensorMap {
    TensorMap {
        file_name: format!("{theirs}.weight"),
        file_shape: vec![rows, cols],
        param: ours.into(),
        rows: first..first + rows,
    }
}

fn vector(theirs: &str, ours: &str, len: usize) -> TensorMap {
    TensorMap { file_name: format!("{theirs}.weight"), file_shape: vec![len], param: ours.into(), rows: 0..1 }
}
