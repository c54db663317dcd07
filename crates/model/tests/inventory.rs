//! Published models, counted from their configurations: totals and active parameters, embedding and head among both.
//!
//! Active parameters are not compared with their makers' figures: some leave the embedding out of them, or the head too.

use moebius_model::config::SharedExperts;
use moebius_model::families::read_config;
use moebius_model::{Ffn, ModelConfig, UniformDecoder};
use moebius_moe::RouterSettings;
use serde_json::{Value, json};

fn read(config: &Value) -> ModelConfig {
    read_config(config.to_string().as_bytes(), "config.json").unwrap()
}

/// Billions in all, and those that take part in one token with embedding and head, of a configuration.
fn count(config: &ModelConfig) -> [f64; 2] {
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

/// Kimi-K2's 1.04 T are reached if its dense first layer is counted with experts; of Scout's 109 B one is vision; Grok-1's
/// 314 B are half a percent less than its sizes make.
const EXCEPTIONS: [&str; 3] = ["Kimi-K2", "Llama 4 Scout", "Grok-1"];

/// Whether a count is within 0.5 % of what its makers publish, or what they round to it.
fn is_rounded(found: f64, published: &str) -> bool {
    let decimals = published.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let wanted: f64 = published.parse().unwrap();
    (found / wanted - 1.0).abs() < 0.005 || format!("{found:.decimals$}") == published
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
    let grok = json!({
        "intermediate_size": 32768, "num_experts": 8, "num_experts_per_tok": 2, "hidden_act": "gelu",
        "attn_output_multiplier": 0.088, "embedding_multiplier_scale": 78.4, "output_multiplier_scale": 0.577,
    });
    let lite = with(deep(64, 6, 1408, 2, [1, 10944]), json!({"q_lora_rank": null}));
    for (name, published, config, wanted) in [
        ("Mixtral 8x7B", "46.7", mixtral([4096, 32, 32, 8, 128], 14336), [46.703, 12.880]),
        ("Mixtral 8x22B", "141", mixtral([6144, 56, 48, 8, 128], 16384), [140.62, 39.15]),
        ("Qwen1.5-MoE-A2.7B", "14.3", qwen2([2048, 24, 16, 16, 128], [60, 4, 1408], 5632), [14.316, 2.689]),
        ("Qwen2-57B-A14B", "57", qwen2([3584, 28, 28, 4, 128], [64, 8, 2560], 20480), [57.41, 14.25]),
        ("Qwen3-30B-A3B", "30.5", qwen3([2048, 48, 32, 4, 128], 768), [30.53, 3.35]),
        ("Qwen3-235B-A22B", "235", qwen3([4096, 94, 64, 4, 128], 1536), [235.09, 22.19]),
        (
            "OLMoE-1B-7B",
            "6.9",
            grouped("olmoe", [2048, 16, 16, 16, 128], 50304, experts("num_experts", 64, 8, 1024)),
            [6.919, 1.282],
        ),
        (
            "DeepSeek-V2",
            "236",
            latent("deepseek_v2", [5120, 60, 128], 102_400, deep(160, 6, 1536, 2, [1, 12288])),
            [235.74, 21.38],
        ),
        ("DeepSeek-V2-Lite", "15.7", latent("deepseek_v2", [2048, 27, 16], 102_400, lite), [15.71, 2.66]),
        (
            "DeepSeek-V3",
            "671",
            latent("deepseek_v3", [7168, 61, 128], 129_280, deep(256, 8, 2048, 1, [3, 18432])),
            [671.03, 37.55],
        ),
        (
            "Kimi-K2",
            "1040",
            latent("deepseek_v3", [7168, 61, 64], 163_840, deep(384, 8, 2048, 1, [1, 18432])),
            [1026.4, 32.86],
        ),
        ("Llama 4 Scout", "109", llama4(16, json!({"interleave_moe_layer_step": 1})), [107.77, 17.17]),
        ("Llama 4 Maverick", "400", llama4(128, json!({"interleave_moe_layer_step": 2})), [400.71, 17.18]),
        ("gpt-oss-20b", "20.9", gpt(24, 32), [20.915, 4.19]),
        ("gpt-oss-120b", "116.8", gpt(36, 128), [116.83, 5.71]),
        (
            "Phi-3.5-MoE",
            "41.9",
            grouped("phimoe", [4096, 32, 32, 8, 128], 32064, with(experts("num_local_experts", 16, 2, 6400), phi)),
            [41.873, 6.64],
        ),
        ("Grok-1", "314", grouped("grok-1", [6144, 64, 48, 8, 128], 131_072, grok), [315.7, 83.8]),
        ("DBRX", "132", dbrx, [131.60, 36.47]),
        ("Granite-1B-A400M", "1.3", granite([1024, 24, 16, 8, 64], 32), [1.335, 0.429]),
        ("Granite-3B-A800M", "3.3", granite([1536, 32, 24, 8, 64], 40), [3.299, 0.883]),
    ] {
        let found = count(&read(&config));
        for (found, wanted) in found.into_iter().zip(wanted) {
            assert!((found / wanted - 1.0).abs() < 0.002, "{name}: counted {found} B, wanted {wanted} B");
        }
        assert_eq!(
            is_rounded(found[0], published),
            !EXCEPTIONS.contains(&name),
            "{name}: {} B, {published} B",
            found[0]
        );
    }
}

/// DeepSeekMoE-16B, whose files bring a program of their own and are no family here: its parts are.
#[test]
fn deepseek_moe_16b_has_the_parameters_that_its_makers_count() {
    let shared = Some(SharedExperts { width: 2 * 1408, gated: false });
    let decoder = UniformDecoder {
        family: "llama",
        vocab_size: 102_400,
        hidden: 2048,
        n_layers: 28,
        n_heads: 16,
        n_kv_heads: 16,
        head_dim: 128,
        ffn: Ffn::moe_with(64, 1408, RouterSettings::softmax(6, false), shared),
        ..UniformDecoder::default()
    };
    let mut config = decoder.config();
    config.layers[0].ffn = Ffn::dense(10944);
    assert!(is_rounded(count(&config)[0], "16.4"));
    for (found, wanted) in count(&config).into_iter().zip([16.376, 2.829]) {
        assert!((found / wanted - 1.0).abs() < 0.002, "counted {found} B, wanted {wanted} B");
    }
}

/// What is counted from the configuration is what a model has.
#[test]
fn the_count_is_the_models() {
    for name in [
        "mixtral",
        "qwen2_moe",
        "deepseek_v3",
        "gpt_oss",
        "phimoe",
        "llama4_text",
        "granitemoeshared",
        "jetmoe",
        "jamba",
    ] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let model = moebius_model::Model::load(&moebius_model::Checkpoint::open(&folder).unwrap()).unwrap();
        let found = model.config.inventory().unwrap();
        let sum = |of: &dyn Fn(&str) -> bool| -> u64 {
            model.params().iter().filter(|param| of(param.name())).map(|param| param.n_elements() as u64).sum()
        };
        assert_eq!(found.total(), sum(&|_| true), "{name}");
        let is_expert = |param: &str| {
            ["moe.gate_up", "moe.down", "moe.gate_up_bias", "moe.down_bias", "heads.q", "heads.o"]
                .iter()
                .any(|part| param.ends_with(&format!(".{part}")))
        };
        // Heads and networks of every fixture that has both are chosen by the same share.
        let moe = model.config.moe().unwrap();
        let chosen = sum(&is_expert) * moe.router.top_k as u64 / moe.n_experts as u64;
        assert_eq!(found.active(), sum(&|param| !is_expert(param)) + chosen, "{name}");
    }
}

#[test]
fn attention_behind_a_window_and_latents_cost_what_is_seen_of_them() {
    let fixture = |name: &str| {
        let file =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).join("config.json");
        read_config(&std::fs::read(file).unwrap(), name).unwrap()
    };
    // Two pairs of layers, one of each behind a window.
    let windowed = fixture("gpt_oss");
    let window = windowed.layers[0].mixer.reach().window().unwrap();
    let attention = windowed.attention().unwrap();
    let each = 4 * (attention.n_heads * attention.head_dim) as u64;
    let limited = windowed.layers.iter().filter(|layer| layer.mixer.reach().window().is_some()).count() as u64;
    let all = windowed.n_layers() as u64 - limited;
    let at = |seen| windowed.operations(seen).unwrap()[1];
    assert_eq!(at(1), each * (all + limited));
    assert_eq!(at(10 * window), each * (10 * all + limited) * window as u64);
    let bytes = windowed.cache_bytes(moebius_kernels::attention::CacheFormat::Bf16);
    let row = 2 * 2 * attention.n_kv_heads * attention.head_dim;
    assert_eq!((bytes.unlimited, bytes.limited), (row * all as usize, row * limited as usize));
    let hybrid = fixture("jamba").cache_bytes(moebius_kernels::attention::CacheFormat::F32);
    assert!(hybrid.states > 0 && hybrid.unlimited > 0 && hybrid.latents == 0);
    let latent = fixture("deepseek_v3").cache_bytes(moebius_kernels::attention::CacheFormat::F32);
    assert_eq!((latent.unlimited, latent.of_token()), (0, latent.latents));
}
