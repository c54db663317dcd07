"""Training tokens/s and peak memory: Moebius against PyTorch on the same small MoE, one run, both sides alternating.

    pip install -r bench/requirements.txt
    cargo build --release
    python bench/train_vs_pytorch.py [--rounds 3] [--steps 12] [--only REGEX] [--out bench/results/train.json]

The model is recipes/small.toml: hidden 256, 6 layers, 8 heads, 8 experts top-2 of 512, vocab 4096, 16 sequences of 256
tokens a step, two threads, AdamW, gradient clipping, balance loss. PyTorch runs transformers' Mixtral with each of its
expert implementations and with a plain index_select loop, in f32 and under bf16 autocast, fused AdamW, random tokens.
Each measurement is a process of its own; its speed is the median step after two warm-up steps, its memory the largest
resident size that the system reports. Leave the machine otherwise idle.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH, SEQUENCE, VOCAB, WARM_UP = 16, 256, 4096, 2
PYTORCH = [(kind, dtype) for kind in ("eager", "grouped_mm", "loop") for dtype in ("f32", "bf16")]


def plain_loop():
    """Replaces the experts' forward by the loop that one would write by hand: sort once, one matmul chain an expert."""
    import torch
    from transformers.models.mixtral import modeling_mixtral

    def forward(self, hidden_states, top_k_index, top_k_weights):
        flat = top_k_index.flatten()
        order = flat.argsort(stable=True)
        token = order // top_k_index.shape[1]
        rows = hidden_states.index_select(0, token)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        outputs = []
        for expert, part in enumerate(rows.split(counts)):
            gate, up = torch.nn.functional.linear(part, self.gate_up_proj[expert]).chunk(2, -1)
            outputs.append(torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.down_proj[expert]))
        weighted = torch.cat(outputs) * top_k_weights.flatten().index_select(0, order)[:, None].to(rows.dtype)
        return torch.zeros_like(hidden_states).index_add(0, token, weighted.to(hidden_states.dtype))

    modeling_mixtral.MixtralExperts.forward = forward


def pytorch(kind, dtype, steps):
    """Runs in a process of its own; prints seconds of each step and the peak memory."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(0)
    if kind == "loop":
        plain_loop()
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=SEQUENCE,
        output_router_logits=True, router_aux_loss_coef=0.01)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager" if kind == "loop" else kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seconds = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def measure_pytorch(kind, dtype, steps):
    command = [sys.executable, __file__, "--pytorch", kind, dtype, "--steps", str(steps)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def measure_moebius(precision, steps):
    recipe = (ROOT / "recipes/small.toml").read_text()
    recipe = re.sub(r'"\.\./data', f'"{ROOT}/data', recipe)
    for key, value in {"steps": steps, "save_every": steps, "validate_every": steps, "warmup_steps": 2,
                       "precision": f'"{precision}"'}.items():
        recipe = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", recipe)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "recipe.toml")
        path.write_text(recipe)
        binary = ROOT / "target/release/moebius"
        command = [str(binary), "--threads", "2", "train", str(path), "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"moebius train failed with status {status}")
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    # `seconds` of a step is its own duration.
    seconds = [line["seconds"] for line in lines if line["kind"] == "step"]
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", default="", help="regular expression: the sides to measure")
    parser.add_argument("--pytorch", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pytorch:
        return pytorch(*arguments.pytorch, arguments.steps)

    sides = {f"moebius {p}": lambda p=p: measure_moebius(p, arguments.steps) for p in ("bf16", "f32")}
    sides |= {f"pytorch {k} {d}": lambda k=k, d=d: measure_pytorch(k, d, arguments.steps) for k, d in PYTORCH}
    sides = {name: measure for name, measure in sides.items() if re.search(arguments.only, name)}
    results = {name: {"tokens_per_second": [], "peak_bytes": []} for name in sides}
    for _ in range(arguments.rounds):
        for name, measure in sides.items():
            measured = measure()
            speed = BATCH * SEQUENCE / statistics.median(measured["seconds"][WARM_UP:])
            results[name]["tokens_per_second"].append(speed)
            results[name]["peak_bytes"].append(measured["peak_bytes"])
            print(f"  {name}: {speed:.0f} tokens/s", file=sys.stderr, flush=True)
    best = max(statistics.median(r["tokens_per_second"]) for n, r in results.items() if n.startswith("pytorch"))
    print(f"{'':24} {'tokens/s':>9} {'(min to max)':>16} {'GB':>6} {'ratio to the best PyTorch':>26}")
    for name, result in results.items():
        speeds = result["tokens_per_second"]
        median, peak = statistics.median(speeds), max(result["peak_bytes"]) / 1e9
        result["ratio_to_best_pytorch"] = median / best
        print(f"{name:24} {median:9.0f} {f'({min(speeds):.0f} to {max(speeds):.0f})':>16} {peak:6.2f} {median / best:26.2f}")
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "")
    report = {"cpu": cpu, "cores": os.cpu_count(), "amx": "amx_bf16" in flags, "avx512_bf16": "avx512_bf16" in flags,
              "steps": arguments.steps, "results": results}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
