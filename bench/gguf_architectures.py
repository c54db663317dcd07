"""Every GGUF architecture, to llama.cpp and from it.

    python bench/gguf_architectures.py [--llama SOURCE] [NAME...]

Needs torch, transformers, safetensors, tokenizers, gguf and llama-cpp-python, and `cargo build --release`. Tiny random
models of each architecture are made with transformers. Compared, in f32 on 24 tokens, and on 12 greedy tokens after 8:

  out     `moebius export` writes the folder; llama.cpp's logits of the file with moebius' of the folder
  in      llama.cpp's own converter (of the source package `llama_cpp_python-*`, unpacked at SOURCE) writes the folder;
          moebius' logits of that file with moebius' of the folder
  trans.  transformers' logits of the folder with moebius'

Differences are relative to the largest logit. Cases whose note says so differ in llama.cpp itself. Exit status 0 if all
others are below 2e-4, greedy tokens the same. Ends with one line of JSON.
"""

import argparse
import ctypes
import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import llama_cpp
import numpy as np
import tokenizers
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOEBIUS = ROOT / "target" / "release" / "moebius"
TOLERANCE = 2e-4
SIZES = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None,
             eos_token_id=None, pad_token_id=None)
LOCAL = dict(intermediate_size=48, num_local_experts=6, num_experts_per_tok=2)
NAMED = dict(num_experts=6, num_experts_per_tok=2)
DEEP = dict(intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
            first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, head_dim=4)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
SCALED = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
CHUNKS = dict(intermediate_size=24, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1, head_dim=8,
              num_hidden_layers=4, interleave_moe_layer_step=2, moe_layers=[1, 3], attention_chunk_size=8192,
              floor_scale=8192, attn_scale=0.1)

# Name: transformers' model type, its keys, and what llama.cpp does otherwise (then only the files are compared).
CASES = {
    "llama": ("llama", dict(SIZES, intermediate_size=64), None),
    "llama, stretched as Llama 3.1": ("llama", dict(SIZES, intermediate_size=64, rope_parameters=LLAMA3), None),
    "llama with experts": ("mixtral", dict(SIZES, **LOCAL), None),
    "qwen2": ("qwen2", dict(SIZES, intermediate_size=64), None),
    "qwen3": ("qwen3", dict(SIZES, intermediate_size=64, head_dim=16), None),
    "qwen2moe": ("qwen2_moe", dict(SIZES, **NAMED, intermediate_size=64, moe_intermediate_size=24,
                                   shared_expert_intermediate_size=40, norm_topk_prob=False), None),
    "qwen3moe": ("qwen3_moe", dict(SIZES, **NAMED, intermediate_size=64, moe_intermediate_size=24, head_dim=16,
                                   norm_topk_prob=True), None),
    "qwen3moe, YaRN": ("qwen3_moe", dict(SIZES, **NAMED, intermediate_size=64, moe_intermediate_size=24, head_dim=16,
                                         norm_topk_prob=True, rope_parameters=YARN), None),
    "olmoe": ("olmoe", dict({**SIZES, "num_key_value_heads": 4}, **NAMED, intermediate_size=24), None),
    "deepseek2 (V2)": ("deepseek_v2", dict(SIZES, **LATENT, **{**DEEP, "norm_topk_prob": False}, q_lora_rank=None,
                                           n_group=1, topk_group=1, topk_method="greedy"), None),
    "deepseek2 (V2, YaRN)": ("deepseek_v2", dict(SIZES, **LATENT, **{**DEEP, "norm_topk_prob": False}, q_lora_rank=20,
                                                 n_group=1, topk_group=1, topk_method="greedy",
                                                 rope_parameters=SCALED), None),
    "deepseek2 (V2, groups)": ("deepseek_v2", dict(SIZES, **LATENT, **{**DEEP, "norm_topk_prob": False}, q_lora_rank=20,
                                                   n_group=4, topk_group=2, topk_method="group_limited_greedy"),
                               "scores groups by their two best experts, as V3 does"),
    "deepseek2 (V3)": ("deepseek_v3", dict(SIZES, **LATENT, **DEEP, q_lora_rank=20, n_group=4, topk_group=2,
                                           scoring_func="sigmoid"), None),
    "deepseek2 (V3, YaRN)": ("deepseek_v3", dict(SIZES, **LATENT, **DEEP, q_lora_rank=20, n_group=1, topk_group=1,
                                                 scoring_func="sigmoid", rope_parameters=SCALED), None),
    "deepseek2 (GLM-4.7-Flash)": ("glm4_moe_lite", dict({**SIZES, "rms_norm_eps": 1e-6}, **LATENT, **DEEP, q_lora_rank=20,
                                                        n_group=1, topk_group=1, scoring_func="sigmoid",
                                                        mlp_layer_types=["dense", "sparse", "sparse"]), None),
    "glm4moe": ("glm4_moe", dict(SIZES, **DEEP, head_dim=16, use_qk_norm=True, attention_bias=True, n_group=1,
                                 topk_group=1), None),
    "dots1": ("dots1", dict({**SIZES, "num_key_value_heads": 4}, **DEEP, n_group=1, topk_group=1,
                            scoring_func="sigmoid", layer_types=["full_attention"] * 3), None),
    "ernie4_5-moe": ("ernie4_5_moe", dict(SIZES, intermediate_size=32, moe_intermediate_size=8, moe_num_experts=6, moe_k=2,
                                          moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=2,
                                          moe_layer_interval=1), None),
    "hunyuan-moe": ("hunyuan_v1_moe", dict(SIZES, intermediate_size=24, num_experts=6, moe_topk=2, head_dim=16), None),
    "minimax-m2": ("minimax_m2", dict(SIZES, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, head_dim=16,
                                      rotary_dim=8, scoring_func="sigmoid"), None),
    "granitemoe": ("granitemoe", dict(SIZES, **LOCAL, embedding_multiplier=6.0, residual_multiplier=0.4,
                                      logits_scaling=0.25, attention_multiplier=0.2), None),
    "granitemoe with a shared expert": ("granitemoeshared", dict(SIZES, **LOCAL, shared_intermediate_size=40,
                                                                 embedding_multiplier=6.0, residual_multiplier=0.4,
                                                                 logits_scaling=0.25, attention_multiplier=0.2), None),
    "phimoe": ("phimoe", dict(SIZES, **LOCAL, attention_bias=True, lm_head_bias=True, sliding_window=None),
               "norms without their mean, experts by softmax"),
    "dbrx": ("dbrx", dict(vocab_size=300, d_model=32, n_heads=4, n_layers=2, max_seq_len=128, bos_token_id=None,
                          eos_token_id=None, attn_config=dict(kv_n_heads=2, clip_qkv=1.0, rope_theta=1e4),
                          ffn_config=dict(ffn_hidden_size=24, hidden_size=32, moe_num_experts=4, moe_top_k=2,
                                          moe_normalize_expert_weights=1.0)), None),
    "llama4": ("llama4_text", dict(SIZES, **CHUNKS), None),
    "gpt-oss": ("gpt_oss", dict(SIZES, **LOCAL, head_dim=8, sliding_window=6), None),
    "gpt-oss, YaRN": ("gpt_oss", dict(SIZES, **LOCAL, head_dim=16, sliding_window=6,
                                      rope_parameters={**YARN, "truncate": False}),
                      "ends of YaRN's ramp rounded to whole pairs"),
    # None of transformers' families: the fixture of the tests.
    "grok": ("grok-1", dict(), "GELU from a table of 16-bit numbers"),
}
FIXTURES = ROOT / "crates" / "model" / "tests" / "fixtures"

# What llama.cpp's converter reads in published files and transformers does not write.
PUBLISHED = {
    "hunyuan-moe": dict(moe_intermediate_size=[24] * 3, moe_topk=[2] * 3, num_shared_expert=[1] * 3),
    "phimoe": dict(architectures=["PhiMoEForCausalLM"], original_max_position_embeddings=128),
}


def make(kind, keys, folder):
    """A random model, its experts' scores far apart, in the hub's layout, with a tokenizer of bytes; none if
    transformers does not know it."""
    if kind == "grok-1":
        shutil.copytree(FIXTURES / "grok", folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | keys))
        save_tokenizer(folder, json.loads(config.read_text())["vocab_size"])
        return None
    torch.manual_seed(7)
    if kind == "gpt_oss" and "rope_parameters" not in keys:
        keys = dict(keys, rope_parameters=dict(rope_type="default", rope_theta=150000.0))
    config = AutoConfig.for_model(kind, **keys)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name and tensor.is_floating_point():
                is_norm = tensor.dim() == 1 and "bias" not in name and "sinks" not in name
                tensor.copy_(torch.randn_like(tensor) * (0.15 if tensor.dim() == 1 else 0.3) + (1.0 if is_norm else 0.0))
    model.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    return model


def save_tokenizer(folder, size):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:size]
    vocab = {token: index for index, token in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


class Llama:
    """A file in llama.cpp, keys and values in f32."""

    def __init__(self, path):
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_threads = 256, 64, 64, 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(64, 0, 1)

    def __call__(self, ids):
        """Logits of every position."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        for at, token in enumerate(ids):
            self.batch.token[at], self.batch.pos[at], self.batch.logits[at] = token, at, 1
            self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, 0
        self.batch.n_tokens = len(ids)
        if status := llama_cpp.llama_decode(self.context, self.batch):
            raise SystemExit(f"llama_decode gave {status}")
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rows = [llama_cpp.llama_get_logits_ith(self.context, at) for at in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (vocab,)).copy() for row in rows])

    def close(self):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def moebius(path):
    """As `Llama`, by `moebius logits`."""
    def logits(ids):
        with tempfile.TemporaryDirectory() as scratch:
            given, out = pathlib.Path(scratch, "in.safetensors"), pathlib.Path(scratch, "out.safetensors")
            save_file({"ids": np.array([ids], dtype=np.int64)}, given)
            command = [MOEBIUS, "logits", "--model", path, "--tokens", given, "--key", "ids", "--out", out]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"{path}: {result.stderr.strip()}")
            return load_file(out)["logits"][0]
    return logits


def greedy(logits, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids[len(prompt):]


def convert(source, folder, path, published):
    """llama.cpp's own converter, without a vocabulary: a made-up tokenizer has none of its names."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | published))
    if str(source) not in sys.path:
        sys.path[:0] = [str(source), str(source / "gguf-py")]
    conversion = importlib.import_module("conversion")
    base = importlib.import_module("conversion.base")
    hparams = base.ModelBase.load_hparams(folder, False)
    model_class = conversion.get_model_class(hparams["architectures"][0], mmproj=False)

    model = model_class(folder, base.gguf.LlamaFileType.ALL_F32, path, eager=True)
    model.set_vocab = model._set_vocab_none
    model.write()


def off(found, wanted):
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=pathlib.Path, help="llama.cpp's source, with convert_hf_to_gguf.py")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    table, failed = {}, []
    print(f"{'':34} {'out':>8} {'greedy':>7} {'in':>8} {'trans.':>8}")
    for name in arguments.names or CASES:
        kind, keys, note = CASES[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch, "model")
            model = make(kind, keys, folder)
            vocab = min(250, json.loads((folder / "config.json").read_text())["vocab_size"])
            ids = [int(token) for token in np.random.default_rng(3).integers(0, vocab, 24)]
            ours, row = moebius(folder)(ids), {}
            if model is not None:
                row["transformers"] = off(ours, model(torch.tensor([ids])).logits[0].detach().numpy())
            written = pathlib.Path(scratch, "written.gguf")
            export = [MOEBIUS, "export", folder, "--gguf", written, "--format", "f32"]
            result = subprocess.run(export, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"{name}: {result.stderr.strip()}")
            llama = Llama(written)
            row["out"] = off(llama(ids), ours)
            row["greedy"] = greedy(llama, ids[:8], 12) == greedy(moebius(folder), ids[:8], 12)
            llama.close()
            row["read back"] = off(moebius(written)(ids), ours)
            if arguments.llama and model is not None:
                theirs = pathlib.Path(scratch, "theirs.gguf")
                convert(arguments.llama.resolve(), folder, theirs, PUBLISHED.get(name, {}))
                row["in"] = off(moebius(theirs)(ids), ours)
        table[name] = row
        close = [row.get("transformers", 0.0), row["read back"], row.get("in", 0.0)] + ([row["out"]] if note is None else [])
        if max(close) > TOLERANCE or (note is None and not row["greedy"]):
            failed.append(name)
        read, theirs = (f"{row[key]:8.1e}" if key in row else f"{'-':>8}" for key in ("in", "transformers"))
        print(f"{name:34} {row['out']:8.1e} {'same' if row['greedy'] else 'other':>7} {read} {theirs}"
              f"{'  ' + note if note else ''}{'  FAILED' if name in failed else ''}", flush=True)
    print(json.dumps(table))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
