//! dots.llm1 (rednote-hilab 2025): DeepSeek-V3's experts, normed heads, perhaps windows in the later layers.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::config::{Mixer, Reach};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "dots1",
    model_types: &["dots1"],
    architecture: "Dots1ForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { n_kv_heads: Some(32), understood: &["layer_types"], ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let moe = shared::read_sigmoid_experts(keys, 1.0)?;
    let config = shared::read(keys, FAMILY.name, Ffn::Moe(moe), None, &DEFAULTS)?;
    let window = if keys.has("sliding_window") { keys.optional_size("sliding_window")? } else { Some(4096) };
    let first = keys.optional_size("max_window_layers")?.unwrap_or(62);
    let is_windowed = |layer| window.is_some() && layer >= first;
    let windowed = shared::read_layer_types(keys, config.n_layers(), is_windowed, "sliding_attention")?;
    let config = shared::with_layers(config, |index, layer| {
        if let Mixer::Attention(attention) = &mut layer.mixer {
            attention.qk_norm = QkNorm::Head;
            attention.reach = Reach::from(window.filter(|_| windowed[index]));
        }
    });
    shared::with_dense_first(keys, config, 0)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_deepseek_experts(config, &mut map);
    let window = config.layers.iter().find_map(|layer| layer.mixer.attention()?.reach.window());
    map.insert("sliding_window".into(), json!(window));
    map.insert("layer_types".into(), shared::layer_types(config, "sliding_attention"));
    map
}
