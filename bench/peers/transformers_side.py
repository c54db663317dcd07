"""transformers' side: a model of random weights in bf16, measured in a process of its own; prints one JSON object.

    python transformers_side.py SHAPE --prefill 512 --decode 64 --threads 2 [--experts grouped_mm]
"""

import argparse
import json
import resource
import time

import shapes
import torch
import transformers


def build(shape, experts):
    """The published class of a shape, its weights drawn in bf16."""
    common = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    if shape.gguf_architecture == "olmoe":
        config = transformers.OlmoeConfig(num_experts=shape.experts, intermediate_size=shape.width, **common)
    elif shape.gguf_architecture == "qwen3moe":
        config = transformers.Qwen3MoeConfig(
            num_experts=shape.experts,
            intermediate_size=shape.width,
            moe_intermediate_size=shape.width,
            norm_topk_prob=True,
            **common,
        )
    else:
        config = transformers.MixtralConfig(
            num_local_experts=shape.experts, intermediate_size=shape.width, sliding_window=None, **common
        )
    config._experts_implementation = experts
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            elif "embed_tokens" in name:
                weight.normal_()
            else:
                weight.normal_(std=(0.2 if name.endswith("o_proj.weight") else 1.0) * weight.shape[-1] ** -0.5)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", default="grouped_mm", choices=("eager", "grouped_mm", "batched_mm"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = shapes.parse(arguments.shape)
    start = time.perf_counter()
    model = build(shape, arguments.experts)
    load = time.perf_counter() - start

    def read(count, cache):
        tokens = torch.randint(3, shape.vocab, (1, count))
        start = time.perf_counter()
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if not torch.isfinite(out.logits).all():
            raise SystemExit("transformers' logits are not finite")
        return time.perf_counter() - start, out.past_key_values

    with torch.inference_mode():
        read(64, None)
        prefill, cache = read(arguments.prefill, None)
        for _ in range(2):
            _, cache = read(1, cache)
        decode = 0.0
        for _ in range(arguments.decode):
            seconds, cache = read(1, cache)
            decode += seconds
    print(
        json.dumps(
            {
                "load_seconds": load,
                "prefill_tokens_per_second": arguments.prefill / prefill,
                "decode_tokens_per_second": arguments.decode / decode,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


main()
