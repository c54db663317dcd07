//! Both spellings of every family, and what absent keys mean.

use super::*;
use serde_json::json;

fn read(value: Value) -> Result<ModelConfig, String> {
    read_config(value.to_string().as_bytes(), "config.json").map_err(|error| error.to_string())
}

fn theta(config: &ModelConfig) -> f64 {
    shared::attention(config).rope.as_ref().unwrap().theta
}

/// The keys that all families need, with others put over them.
fn config(model_type: &str, others: Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 16, "num_local_experts": 4, "num_experts_per_tok": 2
    });
    let others = others.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(others);
    config
}

#[test]
fn versions_4_and_5_of_transformers_say_the_same() {
    for family in ["llama", "mistral", "mixtral"] {
        let v4 = json!({"rope_theta": 500.5, "rope_scaling": null, "torch_dtype": "float32"});
        let v5 = json!({"rope_parameters": {"rope_theta": 500.5, "rope_type": "default"}, "dtype": "float32"});
        let [v4, v5] = [v4, v5].map(|keys| read(config(family, keys)).unwrap());
        assert_eq!(v4, v5);
        assert_eq!(theta(&v4), 500.5);
    }
}

#[test]
fn absent_keys_mean_what_transformers_takes_for_them() {
    let defaults = |family| read(config(family, json!({}))).unwrap();
    let facts = |c: &ModelConfig| {
        let attention = shared::attention(c);
        (theta(c), c.norm.eps(), attention.n_kv_heads, attention.reach.window(), c.max_positions)
    };
    assert_eq!(facts(&defaults("llama")), (1e4, 1e-6, 16, None, 2048));
    assert_eq!(facts(&defaults("mistral")), (1e4, 1e-6, 8, Some(4096), 131_072));
    assert_eq!(facts(&defaults("mixtral")), (1e6, 1e-5, 8, None, 131_072));
    let nulls = read(config("mistral", json!({"num_key_value_heads": null, "sliding_window": null}))).unwrap();
    let attention = shared::attention(&nulls);
    assert_eq!((attention.n_kv_heads, attention.reach.window()), (16, None));
}

#[test]
fn what_is_written_is_read_and_names_its_class() {
    let others = json!({"sliding_window": 7, "tie_word_embeddings": true, "rms_norm_eps": 3e-7, "rope_theta": 12345.678,
        "head_dim": 6, "eos_token_id": [3, 5], "bos_token_id": 1, "router_aux_loss_coef": 0.0123});
    for (family, class) in [("mistral", "MistralForCausalLM"), ("mixtral", "MixtralForCausalLM")] {
        let config = read(config(family, others.clone())).unwrap();
        let written = write_config(&config, "bfloat16");
        assert_eq!(written["architectures"], json!([class]));
        assert_eq!(written["torch_dtype"], "bfloat16");
        let again = read(written).unwrap();
        assert_eq!(again, config);
        assert_eq!(again.router_aux_loss_coef, if family == "mixtral" { 0.0123 } else { 0.0 });
        assert_eq!((again.norm.eps(), shared::attention(&again).reach.window()), (3e-7, Some(7)));
    }
    let refused = read(config("llama", others)).unwrap_err();
    assert_eq!(refused, "config.json: `sliding_window`: this family is computed for null only, found 7");
}

#[test]
fn longrope_is_computed_where_a_token_does_not_depend_on_what_follows() {
    let with = |family: &str, most: usize, long_mscale: f64| {
        let factors = |factor: f64| vec![factor; 2];
        let scaling = json!({"type": "longrope", "short_factor": factors(1.5), "long_factor": factors(4.0),
            "short_mscale": 1.2, "long_mscale": long_mscale, "original_max_position_embeddings": 32});
        read(config(family, json!({"max_position_embeddings": most, "rope_scaling": scaling})))
    };
    for (family, most) in [("phimoe", 128), ("llama", 32)] {
        let config = with(family, most, 1.2).unwrap();
        let again = read(write_config(&config, "float32")).unwrap();
        assert_eq!((again.max_positions, &again), (most, &config), "{family}");
    }
    let mscale = with("phimoe", 128, 1.3).unwrap_err();
    assert!(
        mscale.contains("`rope_scaling.long_mscale`: wanted what short_mscale says, 1.2, found 1.3: which"),
        "{mscale}"
    );
    let longer = with("llama", 128, 1.2).unwrap_err();
    assert!(
        longer.contains("`max_position_embeddings`: wanted at most original_max_position_embeddings 32"),
        "{longer}"
    );
}

#[test]
fn unknown_keys_that_change_nothing_are_accepted() {
    let plain = read(config("mixtral", json!({}))).unwrap();
    let others = json!({"my_note": {"a": [1]}, "use_cache": false, "transformers_version": "9.9", "pad_token_id": 99_999,
        "attention_dropout": 0.1, "attention_bias": false, "quantization_config": null});
    assert_eq!(read(config("mixtral", others)).unwrap(), plain);
}

#[test]
fn every_row_of_every_weight_is_filled_once() {
    for family in ["llama", "mixtral"] {
        let config = read(config(family, json!({}))).unwrap();
        let mut ends = std::collections::BTreeMap::new();
        let mut maps = tensors(&config);
        maps.sort_by_key(|map| (map.param.clone(), map.rows.start));
        for map in maps {
            let end = ends.entry(map.param.clone()).or_insert(0);
            assert_eq!(map.rows.start, *end, "{}", map.file_name);
            *end = map.rows.end;
        }
        // Layers of 6 vectors and matrices and 2 or 3 of the feed-forward part; embedding, norm, head.
        assert_eq!(ends.len(), 3 + 2 * (6 + if family == "mixtral" { 3 } else { 2 }));
    }
}
