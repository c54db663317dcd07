"""Folders go to and fro between transformers and Moebius, and the logits stay.

    python bench/transformers_interop.py [MODEL_FOLDER ...]

Needs torch, transformers and safetensors, and a release build (`cargo build --release` and
`cargo build --release -p moebius-model --example resave`).

Random small models of every family that Moebius has are written by transformers (one file or shards; f32, f16, bf16),
read and written again by Moebius (f32 and bf16), and read by transformers. Compared, in f32 on 2 x 17 tokens:
  read    moebius' logits of the folder that transformers wrote, with transformers' logits of the same
  write   transformers' logits of the folder that moebius wrote, with those of the first folder (equal bits for f32;
          for bf16 with those of the first model rounded to bf16)
Folders given are checked in the same way. Exit status 0 only if every difference is at most 1e-4 (writing: zero).
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = ROOT / "target" / "release"
TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)


def cases():
    """Name, configuration, dtype, largest shard."""
    yield "mixtral", MixtralConfig(**SIZES, **MOE), torch.float32, "1GB"
    yield "mixtral window tied", MixtralConfig(**SIZES, **MOE, sliding_window=5, tie_word_embeddings=True), torch.float32, "1GB"
    yield "mixtral theta top-3", MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=3, head_dim=24,
                                               rope_parameters={"rope_type": "default", "rope_theta": 12345.678}), torch.float32, "1GB"
    yield "mixtral shards bf16", MixtralConfig(**SIZES, **MOE), torch.bfloat16, "100KB"
    yield "mixtral shards f16", MixtralConfig(**SIZES, **MOE), torch.float16, "100KB"
    yield "llama", LlamaConfig(**SIZES), torch.float32, "1GB"
    yield "llama tied bf16", LlamaConfig(**SIZES, tie_word_embeddings=True), torch.bfloat16, "100KB"
    yield "mistral window", MistralConfig(**SIZES, sliding_window=7), torch.float32, "1GB"
    yield "mistral", MistralConfig(**SIZES, sliding_window=None), torch.float32, "1GB"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def moebius_logits(folder, ids, scratch):
    tokens, out = scratch / "tokens.safetensors", scratch / "logits.safetensors"
    safetensors.torch.save_file({"ids": ids}, tokens)
    call = ["logits", "--model", folder, "--tokens", tokens, "--key", "ids", "--out", out, "--dtype", "f32"]
    subprocess.run([RELEASE / "moebius", *map(str, call)], check=True, stdout=subprocess.DEVNULL)
    return safetensors.torch.load_file(out)["logits"]


def check(name, folder, scratch):
    """The differences of one folder; true if they are small enough."""
    model = load(folder)
    ids = torch.randint(0, model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    wanted = logits(model, ids)
    differences = {"read": (moebius_logits(folder, ids, scratch) - wanted).abs().max().item()}
    for dtype in ["f32", "bf16"]:
        again = scratch / f"again-{dtype}"
        subprocess.run([RELEASE / "examples" / "resave", str(folder), str(again), dtype], check=True)
        if dtype == "bf16":
            # Weights only: model.to() would round the rotary frequencies too.
            for weight in model.parameters():
                weight.data = weight.data.to(torch.bfloat16).to(torch.float32)
            wanted = logits(model, ids)
        differences[f"write {dtype}"] = (logits(load(again), ids) - wanted).abs().max().item()
        kept = json.loads((again / "config.json").read_text())
        assert kept["architectures"] == model.config.architectures, kept
    good = differences["read"] <= TOLERANCE and differences["write f32"] == 0.0 and differences["write bf16"] == 0.0
    figures = "  ".join(f"{what} {difference:.1e}" for what, difference in differences.items())
    print(f"{name:<24} {figures}  {'ok' if good else 'DIFFERS'}", flush=True)
    return good


def main(folders):
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; largest differences of logits")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    good = True
    for number, (name, config, dtype, shard) in enumerate(cases()):
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            torch.manual_seed(number)
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            model.save_pretrained(scratch / "model", max_shard_size=shard)
            good &= check(name, scratch / "model", scratch)
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            good &= check(pathlib.Path(folder).name, pathlib.Path(folder), pathlib.Path(scratch))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
