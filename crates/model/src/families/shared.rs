//! What the families have in common: keys of Llama's kind.

use super::TensorMap;
use super::keys::Keys;
use super::rope::{self, RopeDefaults};
use crate::config::{AttentionConfig, DenseFfn, LayerConfig, Mixer, MoeFfn, SharedExperts, check_layer_count};
use crate::{Ffn, ModelConfig, ModelError, UniformDecoder};
use moebius_moe::{ExpertGroups, GroupScore, Normalise, RouterSettings, Score};
use serde_json::{Map, Value, json};

/// What transformers takes where a key is absent, and what a family understands that others refuse.
pub(super) struct Defaults {
    pub(super) rope: RopeDefaults,
    pub(super) rms_eps: f64,
    pub(super) max_positions: usize,
    /// As many as query heads if none. That is also what null means, whatever the family.
    pub(super) n_kv_heads: Option<usize>,
    /// What the other sizes make it if none. That is also what null means.
    pub(super) head_dim: Option<usize>,
    /// Keys of [`FOREIGN`], `hidden_act` and `layer_types` that the family reads itself.
    pub(super) understood: &'static [&'static str],
}

impl Defaults {
    /// Llama's.
    pub(super) const LLAMA: Self = Self {
        rope: RopeDefaults::halves(1e4),
        rms_eps: 1e-6,
        max_positions: 2048,
        n_kv_heads: None,
        head_dim: None,
        understood: &[],
    };
}

/// Keys that some relative of these models understands, that would change what is computed, and the value with which they
/// do not.
const FOREIGN: [(&str, Value); 11] = [
    ("attention_bias", Value::Bool(false)),
    ("mlp_bias", Value::Bool(false)),
    ("use_bias", Value::Bool(false)),
    ("use_qk_norm", Value::Bool(false)),
    ("lm_head_bias", Value::Bool(false)),
    ("quantization_config", Value::Null),
    ("clip_qkv", Value::Null),
    ("attn_logit_softcapping", Value::Null),
    ("final_logit_softcapping", Value::Null),
    ("rotary_dim", Value::Null),
    ("attention_chunk_size", Value::Null),
];

/// Reads the keys of Llama's kind, `window` read by the family.
pub(super) fn read(
    keys: &Keys,
    family: &str,
    ffn: Ffn,
    window: Option<usize>,
    defaults: &Defaults,
) -> Result<ModelConfig, ModelError> {
    refuse_other_arithmetic(keys, window, defaults)?;
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
        rms_eps: keys.number("rms_norm_eps", defaults.rms_eps)?,
        window,
        tie_embeddings: keys.flag("tie_word_embeddings", false)?,
        ffn,
        ..UniformDecoder::default()
    };
    let rope = rope::read(keys, head_dim, defaults.rope)?;
    let config = ModelConfig {
        bos_token: keys.token_ids("bos_token_id")?.first().copied(),
        eos_tokens: keys.token_ids("eos_token_id")?,
        ..decoder.config()
    };
    Ok(with_attention(config, |attention| attention.rope = Some(rope.clone())))
}

/// The number of layers, checked before a list of so many is made.
pub(super) fn layer_count(keys: &Keys) -> Result<usize, ModelError> {
    let n_layers = keys.size("num_hidden_layers")?;
    check_layer_count(n_layers).map_err(|(key, message)| keys.error(key, message))?;
    Ok(n_layers)
}

/// Changes every layer, by its number.
pub(super) fn with_layers(mut config: ModelConfig, change: impl Fn(usize, &mut LayerConfig)) -> ModelConfig {
    config.layers.iter_mut().enumerate().for_each(|(index, layer)| change(index, layer));
    config
}

/// Changes the attention of every layer that has one of this kind.
pub(super) fn with_attention(config: ModelConfig, change: impl Fn(&mut AttentionConfig)) -> ModelConfig {
    with_layers(config, |_, layer| {
        if let Mixer::Attention(attention) = &mut layer.mixer {
            change(attention);
        }
    })
}

/// The attention that all layers of a family of Llama's kind have.
pub(super) fn attention(config: &ModelConfig) -> &AttentionConfig {
    config.attention().expect("a family of Llama's kind has attention")
}

/// Reads the experts of Qwen's kind; `width` names the key of their inner width. Hub files say `num_experts`,
/// transformers 5 also `num_local_experts`.
pub(super) fn read_experts(keys: &Keys, width: &str) -> Result<Ffn, ModelError> {
    let count = keys.spelled(&["num_experts", "num_local_experts"]);
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
    write_balance(config, map);
}

/// Writes the weight of the load-balancing loss.
pub(super) fn write_balance(config: &ModelConfig, map: &mut Map<String, Value>) {
    map.insert("router_aux_loss_coef".into(), json!(config.router_aux_loss_coef));
    map.insert("output_router_logits".into(), json!(false));
}

/// Reads the sparse part of DeepSeek-V3's kind: chosen by sigmoid + bias, groups by their two best.
pub(super) fn read_sigmoid_experts(keys: &Keys, scale: f64) -> Result<MoeFfn, ModelError> {
    keys.only("scoring_func", json!("sigmoid"))?;
    keys.only("topk_method", json!("noaux_tc"))?;
    let groups = read_groups(keys, GroupScore::TwoBest)?;
    let normalise = match keys.flag("norm_topk_prob", true)? {
        true => Normalise::Sum { plus: 1e-20 },
        false => Normalise::None,
    };
    let router = RouterSettings {
        score: Score::Sigmoid,
        selection_bias: true,
        groups,
        normalise,
        scale: keys.number("routed_scaling_factor", scale)? as f32,
        ..RouterSettings::softmax(keys.size("num_experts_per_tok")?, false)
    };
    moe_of(keys, router)
}

/// Groups of experts, of which there may be one only.
pub(super) fn read_groups(keys: &Keys, score: GroupScore) -> Result<Option<ExpertGroups>, ModelError> {
    let (count, used) = (keys.optional_size("n_group")?.unwrap_or(1), keys.optional_size("topk_group")?.unwrap_or(1));
    Ok(if count == 1 && used == 1 { None } else { Some(ExpertGroups { count, used, score }) })
}

/// Experts of DeepSeek's kind behind a router, with shared ones.
pub(super) fn moe_of(keys: &Keys, router: RouterSettings) -> Result<MoeFfn, ModelError> {
    let width = keys.size("moe_intermediate_size")?;
    let shared = match keys.optional_size("n_shared_experts")?.unwrap_or(0) {
        0 => None,
        count => Some(SharedExperts { width: count.saturating_mul(width), gated: false }),
    };
    let n_experts = keys.size(keys.spelled(&["n_routed_experts", "num_local_experts"]))?;
    let Ffn::Moe(moe) = Ffn::moe_with(n_experts, width, router, shared) else { unreachable!("made of experts") };
    Ok(moe)
}

/// Writes what [`moe_of`], [`read_groups`] and [`read_sigmoid_experts`] read.
pub(super) fn write_deepseek_experts(config: &ModelConfig, map: &mut Map<String, Value>) {
    let Some(moe) = config.moe() else { return };
    map.insert("n_routed_experts".into(), moe.n_experts.into());
    map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
    map.insert("moe_intermediate_size".into(), moe.width.into());
    map.insert("n_shared_experts".into(), moe.shared.map_or(0, |shared| shared.width / moe.width).into());
    map.insert("norm_topk_prob".into(), (moe.router.normalise != Normalise::None).into());
    map.insert("routed_scaling_factor".into(), json!(number(moe.router.scale)));
    let (count, used) = moe.router.groups.map_or((1, 1), |groups| (groups.count, groups.used));
    map.insert("n_group".into(), count.into());
    map.insert("topk_group".into(), used.into());
    let dense = config.layers.iter().take_while(|layer| matches!(layer.ffn, Ffn::Dense(_))).count();
    map.insert("first_k_dense_replace".into(), dense.into());
}

/// Reads which layers are dense: the first so many, or a list of kinds.
pub(super) fn with_dense_first(keys: &Keys, config: ModelConfig, first: usize) -> Result<ModelConfig, ModelError> {
    let dense = keys.size("intermediate_size")?;
    let kinds = match keys.get("mlp_layer_types") {
        None => {
            let first = keys.optional_size("first_k_dense_replace")?.unwrap_or(first);
            (0..config.n_layers()).map(|layer| layer < first).collect()
        }
        Some(_) => keys.list("mlp_layer_types", "`dense` or `sparse` for each layer", |kind| match kind.as_str() {
            Some("dense") => Some(true),
            Some("sparse") => Some(false),
            _ => None,
        })?,
    };
    with_dense(keys, config, "mlp_layer_types", &kinds, dense)
}

/// Makes the layers that `dense` marks dense networks of a width.
pub(super) fn with_dense(
    keys: &Keys,
    config: ModelConfig,
    key: &str,
    dense: &[bool],
    width: usize,
) -> Result<ModelConfig, ModelError> {
    if dense.len() != config.n_layers() {
        let message = format!("wanted one of each of {} layers, found {}", config.n_layers(), dense.len());
        return Err(keys.error(key, message));
    }
    Ok(with_layers(config, |index, layer| {
        if dense[index] {
            layer.ffn = Ffn::dense(width);
        }
    }))
}

/// Reads which layers are mixtures as Qwen's kind says it: each so many, but those of a list.
pub(super) fn with_sparse_steps(keys: &Keys, config: ModelConfig) -> Result<ModelConfig, ModelError> {
    let step = keys.optional_size("decoder_sparse_step")?.unwrap_or(1).max(1);
    let listed: Vec<usize> = match keys.get("mlp_only_layers") {
        None => Vec::new(),
        Some(_) => keys.list("mlp_only_layers", "a list of layers", |layer| {
            layer.as_u64().and_then(|layer| usize::try_from(layer).ok())
        })?,
    };
    let is_dense = |layer: usize| listed.contains(&layer) || !(layer + 1).is_multiple_of(step);
    let dense: Vec<bool> = (0..config.n_layers()).map(is_dense).collect();
    let width = if dense.contains(&true) { keys.size("intermediate_size")? } else { 0 };
    with_dense(keys, config, "mlp_only_layers", &dense, width)
}

/// Writes what [`with_sparse_steps`] reads.
pub(super) fn write_sparse_steps(config: &ModelConfig, map: &mut Map<String, Value>) {
    map.insert("decoder_sparse_step".into(), json!(1));
    let dense = (0..config.n_layers()).filter(|&layer| config.layers[layer].ffn.moe().is_none());
    map.insert("mlp_only_layers".into(), dense.collect());
}

/// The inner width of the dense layers, or if there are none of the experts.
pub(super) fn dense_width(config: &ModelConfig) -> usize {
    config.dense().map_or_else(|| config.layers[0].ffn.width(), |DenseFfn { width, .. }| *width)
}

/// Reads which layers see through a window: a kind for each layer, or what `otherwise` says.
pub(super) fn read_layer_types(
    keys: &Keys,
    n_layers: usize,
    otherwise: impl Fn(usize) -> bool,
    limited: &str,
) -> Result<Vec<bool>, ModelError> {
    if keys.get("layer_types").is_none() {
        return Ok((0..n_layers).map(otherwise).collect());
    }
    let wanted = format!("`full_attention` or `{limited}` for each layer");
    let kinds = keys.list("layer_types", &wanted, |kind| match kind.as_str() {
        Some("full_attention") => Some(false),
        Some(kind) if kind == limited => Some(true),
        _ => None,
    })?;
    if kinds.len() != n_layers {
        return Err(keys.error("layer_types", format!("wanted {n_layers} kinds, found {}", kinds.len())));
    }
    Ok(kinds)
}

/// The kinds of all layers, as `layer_types` says them.
pub(super) fn layer_types(config: &ModelConfig, limited: &str) -> Value {
    let kind = |layer: &LayerConfig| match layer.mixer.attention().map(|attention| attention.reach) {
        Some(crate::config::Reach::All) | None => json!("full_attention"),
        Some(_) => json!(limited),
    };
    config.layers.iter().map(kind).collect()
}

/// The f64 whose digits are the fewest that tell an f32 from its neighbours.
pub(super) fn number(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

fn refuse_other_arithmetic(keys: &Keys, window: Option<usize>, defaults: &Defaults) -> Result<(), ModelError> {
    for (key, neutral) in [("hidden_act", json!("silu"))].into_iter().chain(FOREIGN) {
        if !defaults.understood.contains(&key) {
            keys.only(key, neutral)?;
        }
    }
    if defaults.understood.contains(&"layer_types") {
        return Ok(());
    }
    let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
    match keys.get("layer_types") {
        None => Ok(()),
        Some(Value::Array(kinds)) if kinds.iter().all(|found| found == kind) => Ok(()),
        Some(found) => Err(keys.error("layer_types", format!("wanted `{kind}` in every layer, found {found}"))),
    }
}

/// Writes the keys that [`read`] reads, in the spelling that both versions of transformers take.
pub(super) fn write(config: &ModelConfig) -> Map<String, Value> {
    let attention = attention(config);
    let mut map = write_common(config);
    map.insert("num_attention_heads".into(), attention.n_heads.into());
    map.insert("num_key_value_heads".into(), attention.n_kv_heads.into());
    map.insert("head_dim".into(), attention.head_dim.into());
    let turning = config.layers.iter().find_map(|layer| layer.mixer.attention()?.rope.as_ref());
    if let Some(turning) = turning {
        rope::write(turning, attention.head_dim, &mut map);
    }
    map
}

/// What [`write`] writes, but the attention.
pub(super) fn write_common(config: &ModelConfig) -> Map<String, Value> {
    let Value::Object(map) = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": dense_width(config),
        "num_hidden_layers": config.n_layers(),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
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

/// The tensors of grouped-query attention in Llama's naming.
pub(super) fn attention_tensors(config: &AttentionConfig, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let AttentionConfig { n_heads, n_kv_heads, head_dim, .. } = *config;
    let (queries, keys) = (n_heads * head_dim, n_kv_heads * head_dim);
    let stored = if config.gated { 2 * queries } else { queries };
    let mut all = Vec::new();
    for (letter, rows, cols) in
        [("q", stored, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)]
    {
        all.push(matrix(&format!("{theirs}.{letter}_proj"), &format!("{ours}.{letter}"), rows, cols));
    }
    for (letter, width) in [("q", queries), ("k", keys), ("v", keys)].into_iter().filter(|_| config.qkv_bias) {
        let (file_name, param) = (format!("{theirs}.{letter}_proj.bias"), format!("{ours}.{letter}_bias"));
        all.push(TensorMap::whole(file_name, &[width], param, 0..1));
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
    TensorMap::whole(format!("{theirs}.weight"), &[rows, cols], ours, first..first + rows)
}

/// A whole vector.
pub(super) fn vector(theirs: &str, ours: &str, len: usize) -> TensorMap {
    TensorMap::whole(format!("{theirs}.weight"), &[len], ours, 0..1)
}
