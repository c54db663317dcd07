//! MiniMax-M2 (MiniMax 2025): experts chosen by sigmoid and a bias, always renormalised; queries and keys normed whole; half
//! of a head turns.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::{self, Names};
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use moebius_moe::{Normalise, RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "minimax_m2",
    model_types: &["minimax_m2"],
    architecture: "MiniMaxM2ForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const NAMES: Names = Names {
    moe: "block_sparse_moe",
    experts: tensors::NUMBERED,
    selection_bias: "e_score_correction_bias",
    ..Names::LLAMA
};

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::halves(5e6),
    max_positions: 196_608,
    n_kv_heads: Some(8),
    head_dim: Some(128),
    understood: &["rotary_dim", "use_qk_norm"],
    ..shared::Defaults::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("scoring_func", json!("sigmoid"))?;
    keys.only("use_qk_norm", json!(true))?;
    let top_k = keys.size("num_experts_per_tok")?;
    let router = RouterSettings {
        score: Score::Sigmoid,
        selection_bias: true,
        normalise: Normalise::Sum { plus: 0.0 },
        ..RouterSettings::softmax(top_k, false)
    };
    let ffn = Ffn::moe_with(keys.size("num_local_experts")?, keys.size("intermediate_size")?, router, None);
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let turning = keys.optional_size("rotary_dim")?;
    let config = ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config };
    Ok(shared::with_attention(config, |attention| {
        attention.qk_norm = QkNorm::Projection;
        if let (Some(rope), Some(turning)) = (&mut attention.rope, turning) {
            rope.dims = turning;
        }
    }))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("num_local_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
    }
    shared::write_balance(config, &mut map);
    map.insert("scoring_func".into(), json!("sigmoid"));
    map.insert("use_qk_norm".into(), json!(true));
    map.insert("rotary_dim".into(), json!(shared::attention(config).rope.as_ref().map(|rope| rope.dims)));
    map
}
