//! Published models, counted from their configurations: totals and active parameters as their makers round them.

use moebius_model::families::read_config;
use serde_json::{Value, json};

/// Billions in all, and those that take part in one token with embedding and head, of a configuration.
fn count(config: &Value) -> [f64; 2] {
    let config = read_config(config.to_string().as_bytes(), "config.json").unwrap();
    let found = config.inventory().unwrap();
    [found.total() as f64 / 1e9, found.active() as f64 / 1e9]
}

fn with(base: Value, more: Value) -> Value {
    let (mut base, more) = (base.as_object().unwrap().clone(), more.as_object().unwrap().clone());
    base.extend(more);
    Value::Object(base)
}

/// Layers, width and heads of grouped-query attention.
fn grouped(model_type: &str, [hidden, layers, heads, kv, head_dim]: [usize; 5], vocab: usize, more: Value) -> Value {
    let base = json!({
        "model_type": model_type, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": 4096,
    });
    with(base, more)
}

/// Latent attention of DeepSeek's sizes.
fn latent(model_type: &str, [hidden, layers, heads]: [usize; 3], vocab: usize, more: Value) -> Value {
    let sizes = json!({
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": 1536,
    });
    with(with(grouped(model_type, [hidden, layers, heads, heads, 64], vocab, sizes), json!({"head_dim": 64})), more)
}

fn experts(count: &str, n_experts: usize, top_k: usize, width: usize) -> Value {
    json!({count: n_experts, "num_experts_per_tok": top_k, "intermediate_size": width, "moe_intermediate_size": width})
}

fn deep(n_experts: usize, top_k: usize, width: usize, shared: usize, dense: [usize; 2]) -> Value {
    with(
        experts("n_routed_experts", n_experts, top_k, width),
        json!({"n_shared_experts": shared, "first_k_dense_replace": dense[0], "intermediate_size": dense[1]}),
    )
}

#[test]
fn published_models_have_the_parameters_that_their_makers_count() {
    let mixtral = |sizes, width| grouped("mixtral", sizes, 32000, experts("num_local_experts", 8, 2, width));
    let qwen2 = |sizes, e: [usize; 3], shared: usize| {
        let more = json!({"shared_expert_intermediate_size": shared});
        grouped("qwen2_moe", sizes, 151_936, with(experts("num_experts", e[0], e[1], e[2]), more))
    };
    let qwen3 = |sizes, width| grouped("qwen3_moe", sizes, 151_936, experts("num_experts", 128, 8, width));
    let gpt =
        |layers, n| grouped("gpt_oss", [2880, layers, 64, 8, 64], 201_088, experts("num_local_experts", n, 4, 2880));
    let granite = |sizes, n| {
        let tied = json!({"tie_word_embeddings": true});
        grouped("granitemoe", sizes, 49155, with(experts("num_local_experts", n, 8, 512), tied))
    };
    let llama4 = |n, more: Value| {
        let experts = with(experts("num_local_experts", n, 1, 8192), json!({"intermediate_size_mlp": 16384}));
        grouped("llama4_text", [5120, 48, 40, 8, 128], 202_048, with(experts, more))
    };
    let phi = json!({"attention_bias": true, "lm_head_bias": true});
    let dbrx = json!({
        "model_type": "dbrx", "d_model": 6144, "n_layers": 40, "n_heads": 48, "vocab_size": 100_352, "max_seq_len": 32768,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500_000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1},
    });
    let lite = with(deep(64, 6, 1408, 2, [1, 10944]), json!({"q_lora_rank": null}));
    for (name, config, wanted) in [
        ("Mixtral 8x7B", mixtral([4096, 32, 32, 8, 128], 14336), [46.703, 12.880]),
        ("Mixtral 8x22B", mixtral([6144, 56, 48, 8, 128], 16384), [140.62, 39.15]),
        ("Qwen1.5-MoE-A2.7B", qwen2([2048, 24, 16, 16, 128], [60, 4, 1408], 5632), [14.316, 2.689]),
        ("Qwen2-57B-A14B", qwen2([3584, 28, 28, 4, 128], [64, 8, 2560], 20480), [57.41, 14.25]),
        ("Qwen3-30B-A3B", qwen3([2048, 48, 32, 4, 128], 768), [30.53, 3.35]),
        ("Qwen3-235B-A22B", qwen3([4096, 94, 64, 4, 128], 1536), [235.09, 22.19]),
        (
            "OLMoE-1B-7B",
            grouped("olmoe", [2048, 16, 16, 16, 128], 50304, experts("num_experts", 64, 8, 1024)),
            [6.919, 1.282],
        ),
        (
            "DeepSeek-V2",
            latent("deepseek_v2", [5120, 60, 128], 102_400, deep(160, 6, 1536, 2, [1, 12288])),
            [235.74, 21.38],
        ),
        ("DeepSeek-V2-Lite", latent("deepseek_v2", [2048, 27, 16], 102_400, lite), [15.71, 2.66]),
        (
            "DeepSeek-V3",
            latent("deepseek_v3", [7168, 61, 128], 129_280, deep(256, 8, 2048, 1, [3, 18432])),
            [671.03, 37.55],
        ),
        ("Kimi-K2", latent("deepseek_v3", [7168, 61, 64], 163_840, deep(384, 8, 2048, 1, [1, 18432])), [1026.4, 32.86]),
        ("Llama 4 Scout", llama4(16, json!({"interleave_moe_layer_step": 1})), [107.77, 17.17]),
        ("Llama 4 Maverick", llama4(128, json!({"interleave_moe_layer_step": 2})), [400.71, 17.18]),
        ("gpt-oss-20b", gpt(24, 32), [20.915, 4.19]),
        ("gpt-oss-120b", gpt(36, 128), [116.83, 5.71]),
        (
            "Phi-3.5-MoE",
            grouped("phimoe", [4096, 32, 32, 8, 128], 32064, with(experts("num_local_experts", 16, 2, 6400), phi)),
            [41.873, 6.64],
        ),
        ("DBRX", dbrx, [131.60, 36.47]),
        ("Granite-1B-A400M", granite([1024, 24, 16, 8, 64], 32), [1.335, 0.429]),
        ("Granite-3B-A800M", granite([1536, 32, 24, 8, 64], 40), [3.299, 0.883]),
    ] {
        for (found, wanted) in count(&config).into_iter().zip(wanted) {
            assert!((found / wanted - 1.0).abs() < 0.002, "{name}: counted {found} B, wanted {wanted} B");
        }
    }
}

/// What is counted from the configuration is what a model has.
#[test]
fn the_count_is_the_models() {
    for name in ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "phimoe", "llama4_text", "granitemoeshared"] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let model = moebius_model::Model::load(&moebius_model::Checkpoint::open(&folder).unwrap()).unwrap();
        let (found, wanted) = (model.config.inventory().unwrap(), model.count_params());
        assert_eq!(found.total(), wanted.total as u64, "{name}");
        // The model's own count leaves experts' biases among the active.
        if !model.config.moe().is_some_and(|moe| moe.bias) {
            assert_eq!(found.active(), wanted.active as u64, "{name}");
        }
    }
}
