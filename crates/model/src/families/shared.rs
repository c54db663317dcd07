//! What the families have in common: keys and tensor names of Llama's kind.

use super::TensorMap;
use super::keys::Keys;
use crate::config::{AttentionConfig, Mixer, MoeFfn, check_layer_count};
use crate::{Ffn, ModelConfig, ModelError, UniformDecoder};
use moebius_moe::Normalise;
use serde_json::{Map, Value, json};

/// What transformers takes where a key is absent.
pub(super) struct Defaults {
    pub(super) rope_theta: f64,
    pub(super) rms_eps: f64,
    pub(super) max_positions: usize,
    /// As many as query heads if none. That is also what null means, whatever the family.
    pub(super) n_kv_heads: Option<usize>,
    /// What the other sizes make it if none. That is also what null means.
    pub(super) head_dim: Option<usize>,
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
    let absent = defaults.head_dim.filter(|_| !keys.has("head_dim"));
    let head_dim = match keys.optional_size("head_dim")?.or(absent) {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
        None => {
            let message = format!("wanted a divisor of hidden_size {hidden}, found {n_heads}");
            return Err(keys.error("num_attention_heads", message));
        }
    };
    let decoder = UniformDecoder {
        family,
        vocab_size: keys.size("vocab_size")?,
        hidden,
        n_layers: layer_count(keys)?,
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
        ffn,
        ..UniformDecoder::default()
    };
    Ok(ModelConfig {
        bos_token: keys.token_ids("bos_token_id")?.first().copied(),
        eos_tokens: keys.token_ids("eos_token_id")?,
        ..decoder.config()
    })
}

/// The number of layers, checked before a list of so many is made.
pub(super) fn layer_count(keys: &Keys) -> Result<usize, ModelError> {
    let n_layers = keys.size("num_hidden_layers")?;
    check_layer_count(n_layers).map_err(|(key, message)| keys.error(key, message))?;
    Ok(n_layers)
}

/// Changes the attention of every layer.
pub(super) fn with_attention(mut config: ModelConfig, change: impl Fn(&mut AttentionConfig)) -> ModelConfig {
    for layer in &mut config.layers {
        match &mut layer.mixer {
            Mixer::Attention(attention) => change(attention),
        }
    }
    config
}

/// The attention that all layers of a family of Llama's kind have.
pub(super) fn attention(config: &ModelConfig) -> &AttentionConfig {
    config.attention().expect("a family of Llama's kind has attention")
}

/// Reads the experts of Qwen's kind; `width` names the key of their inner width. Hub files say `num_experts`,
/// transformers 5 also `num_local_experts`.
pub(super) fn read_experts(keys: &Keys, width: &str) -> Result<Ffn, ModelError> {
    let count = if keys.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let (top_k, renormalise) = (keys.size("num_experts_per_tok")?, keys.flag("norm_topk_prob", false)?);
    Ok(Ffn::moe_of(keys.size(count)?, top_k, keys.size(width)?, renormalise))
}

/// Writes what [`read_experts`] reads, but the width.
pub(super) fn write_experts(config: &ModelConfig, map: &mut Map<String, Value>) {
    if let Some(moe) = config.moe() {
        map.insert("num_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
        map.insert("norm_topk_prob".into(), (moe.router.normalise != Normalise::None).into());
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
    let attention = attention(config);
    let Value::Object(map) = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.layers[0].ffn.width(),
        "num_hidden_layers": config.n_layers(),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rope_theta": attention.rope.as_ref().map(|rope| rope.theta),
        "rms_norm_eps": config.norm.eps(),
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
    let mut all = vec![matrix("model.embed_tokens", "embedding", config.vocab_size, hidden)];
    for (layer, parts) in config.layers.iter().enumerate() {
        let (theirs, ours) = (format!("model.layers.{layer}"), format!("layers.{layer}"));
        all.push(vector(&format!("{theirs}.input_layernorm"), &format!("{ours}.attention_norm"), hidden));
        match &parts.mixer {
            Mixer::Attention(attention) => all.extend(attention_tensors(
                attention,
                hidden,
                &format!("{theirs}.self_attn"),
                &format!("{ours}.attention"),
            )),
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

/// The tensors of grouped-query attention in Llama's naming.
pub(super) fn attention_tensors(config: &AttentionConfig, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let AttentionConfig { n_heads, n_kv_heads, head_dim, .. } = *config;
    let (queries, keys) = (n_heads * head_dim, n_kv_heads * head_dim);
    let mut all = Vec::new();
    for (letter, rows, cols) in
        [("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)]
    {
        all.push(matrix(&format!("{theirs}.{letter}_proj"), &format!("{ours}.{letter}"), rows, cols));
    }
    for (letter, width) in [("q", queries), ("k", keys), ("v", keys)].into_iter().filter(|_| config.qkv_bias) {
        let (file_name, param) = (format!("{theirs}.{letter}_proj.bias"), format!("{ours}.{letter}_bias"));
        all.push(TensorMap { file_name, file_shape: vec![width], param, rows: 0..1 });
    }
    for (letter, heads) in [("q", n_heads), ("k", n_kv_heads)] {
        if let Some(width) = config.qk_norm.width(heads, head_dim) {
            all.push(vector(&format!("{theirs}.{letter}_norm"), &format!("{ours}.{letter}_norm"), width));
        }
    }
    all
}

/// The tensors of a SwiGLU network in Llama's naming.
pub(super) fn network_tensors(width: usize, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let gate_up = format!("{ours}.gate_up");
    vec![
        part(&format!("{theirs}.gate_proj"), &gate_up, 0, width, hidden),
        part(&format!("{theirs}.up_proj"), &gate_up, width, width, hidden),
        matrix(&format!("{theirs}.down_proj"), &format!("{ours}.down"), hidden, width),
    ]
}

/// What an expert's gate, up and down are called.
pub(super) type ExpertNames = [&'static str; 3];

/// The tensors of a router `gate` and of experts `experts.N`.
pub(super) fn expert_tensors(
    moe: &MoeFfn,
    hidden: usize,
    theirs: &str,
    ours: &str,
    names: ExpertNames,
) -> Vec<TensorMap> {
    let mut all = vec![matrix(&format!("{theirs}.gate"), &format!("{ours}.router"), moe.n_experts, hidden)];
    all.extend(bank_tensors(moe, hidden, theirs, ours, names));
    all
}

/// The tensors of experts `experts.N` alone.
pub(super) fn bank_tensors(
    moe: &MoeFfn,
    hidden: usize,
    theirs: &str,
    ours: &str,
    [gate, up, down]: ExpertNames,
) -> Vec<TensorMap> {
    let (n_experts, width) = (moe.n_experts, moe.width);
    let mut all = Vec::new();
    let (ours_gate_up, ours_down) = (format!("{ours}.gate_up"), format!("{ours}.down"));
    for expert in 0..n_experts {
        let theirs = |name: &str| format!("{theirs}.experts.{expert}.{name}");
        all.push(part(&theirs(gate), &ours_gate_up, 2 * expert * width, width, hidden));
        all.push(part(&theirs(up), &ours_gate_up, (2 * expert + 1) * width, width, hidden));
        all.push(part(&theirs(down), &ours_down, expert * hidden, hidden, width));
    }
    all
}

/// The feed-forward part of a layer, `theirs` being what both kinds of it begin with.
pub(super) fn feed_forward_tensors(
    config: &ModelConfig,
    layer: usize,
    [dense, sparse]: [&str; 2],
    names: ExpertNames,
) -> Vec<TensorMap> {
    let (theirs, ours, hidden) = (format!("model.layers.{layer}"), format!("layers.{layer}"), config.hidden);
    match &config.layers[layer].ffn {
        Ffn::Dense(network) => {
            network_tensors(network.width, hidden, &format!("{theirs}.{dense}"), &format!("{ours}.mlp"))
        }
        Ffn::Moe(moe) => expert_tensors(moe, hidden, &format!("{theirs}.{sparse}"), &format!("{ours}.moe"), names),
    }
}

/// What Qwen's kind calls an expert's matrices.
pub(super) const PROJECTIONS: ExpertNames = ["gate_proj", "up_proj", "down_proj"];
/// What Mixtral's kind calls them: w1 is the gate, w3 goes up, w2 goes down.
pub(super) const NUMBERED: ExpertNames = ["w1", "w3", "w2"];

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
