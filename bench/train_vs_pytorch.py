"""Training tokens/s and peak memory: Moebius against PyTorch on the same models, one run, all sides alternating.

    pip install -r bench/requirements.txt
    cargo build --release
    python bench/train_vs_pytorch.py [--shape small] [--rounds 3] [--steps 12] [--only REGEX] [--out FILE]

Shapes: `small` is recipes/small.toml (hidden 256, 6 layers, 8 experts top-2 of 512), `fine` has hidden 512, 8 layers and
32 experts top-4 of 256. Both: 8 heads, vocabulary 4096, 16 sequences of 256 tokens a step, two threads, AdamW, gradient
clipping, balance loss. Beside each mixture stands the dense model of the same active size. PyTorch runs transformers'
Mixtral with each of its expert implementations and with a plain index_select loop, and its Llama, in f32 and under bf16
autocast, fused AdamW, random tokens. Each measurement is a process of its own; its speed is the median step after two
warm-up steps, its memory the largest resident size that the system reports. Leave the machine otherwise idle.
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
SHAPES = {
    "small": {"hidden": 256, "layers": 6, "ffn": 512, "experts": 8, "experts_per_token": 2},
    "fine": {"hidden": 512, "layers": 8, "ffn": 256, "experts": 32, "experts_per_token": 4},
}
DTYPES = ("bf16", "f32")
PYTORCH = [(kind, dtype) for kind in ("eager", "grouped_mm", "loop", "dense") for dtype in DTYPES]


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


def pytorch_model(kind, shape):
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    both = {
        "vocab_size": VOCAB, "hidden_size": shape["hidden"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": SEQUENCE}
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=shape["experts_per_token"] * shape["ffn"], **both))
    if kind == "loop":
        plain_loop()
    model = MixtralForCausalLM(MixtralConfig(
        intermediate_size=shape["ffn"], num_local_experts=shape["experts"],
        num_experts_per_tok=shape["experts_per_token"], output_router_logits=True, router_aux_loss_coef=0.01, **both))
    model.set_experts_implementation("eager" if kind == "loop" else kind)
    return model


def pytorch(kind, dtype, shape, steps):
    """Runs in a process of its own; prints seconds of each step and the peak memory."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = pytorch_model(kind, SHAPES[shape])
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


def measure_pytorch(kind, dtype, shape, steps):
    command = [sys.executable, __file__, "--pytorch", kind, dtype, "--shape", shape, "--steps", str(steps)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def recipe_of(is_dense, precision, shape, steps):
    shape = dict(SHAPES[shape])
    recipe = (ROOT / "recipes/small.toml").read_text()
    recipe = re.sub(r'"\.\./data', f'"{ROOT}/data', recipe)
    if is_dense:
        shape["ffn"] *= shape["experts_per_token"]
        recipe = re.sub(r"(?m)^experts.* = .*\n", "", recipe).split("[balance]")[0]
    keys = {"steps": steps, "save_every": steps, "validate_every": steps, "warmup_steps": 2,
            "precision": f'"{precision}"'} | shape
    for key, value in keys.items():
        recipe = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", recipe)
    return recipe


def measure_moebius(is_dense, precision, shape, steps):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "recipe.toml")
        path.write_text(recipe_of(is_dense, precision, shape, steps))
        binary = ROOT / "target/release/moebius"
        command = [str(binary), "--threads", "2", "train", str(path), "--out", f"{folder}/run"]
        said = pathlib.Path(folder, "said")
        with said.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"moebius train ended with {os.waitstatus_to_exitcode(status)}: {said.read_text()[-2000:]}")
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    steps = [line for line in lines if line["kind"] == "step"]
    # `seconds` of a step is its own duration, the optimiser's included.
    return {"seconds": [step["seconds"] for step in steps], "peak_bytes": usage.ru_maxrss * 1024,
            "optimizer_seconds": statistics.median(step["optimizer_seconds"] for step in steps[WARM_UP:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", default="", help="regular expression: the sides to measure")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--pytorch", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, steps = arguments.shape, arguments.steps
    if arguments.pytorch:
        return pytorch(*arguments.pytorch, shape, steps)

    ours = {"moebius": False, "moebius dense": True}
    sides = {f"{name} {p}": lambda d=d, p=p: measure_moebius(d, p, shape, steps) for name, d in ours.items() for p in DTYPES}
    sides |= {f"pytorch {k} {d}": lambda k=k, d=d: measure_pytorch(k, d, shape, steps) for k, d in PYTORCH}
    sides = {name: measure for name, measure in sides.items() if re.search(arguments.only, name)}
    results = {name: {"tokens_per_second": [], "peak_bytes": [], "optimizer_seconds": []} for name in sides}
    for _ in range(arguments.rounds):
        for name, measure in sides.items():
            measured = measure()
            speed = BATCH * SEQUENCE / statistics.median(measured["seconds"][WARM_UP:])
            results[name]["tokens_per_second"].append(speed)
            results[name]["peak_bytes"].append(measured["peak_bytes"])
            results[name]["optimizer_seconds"].append(measured.get("optimizer_seconds"))
            print(f"  {name}: {speed:.0f} tokens/s", file=sys.stderr, flush=True)

    def best(is_dense):
        """The fastest PyTorch row of a kind of model."""
        rows = [r for n, r in results.items() if n.startswith("pytorch") and ("dense" in n) == is_dense]
        return max((statistics.median(r["tokens_per_second"]) for r in rows), default=None)

    print(f"{shape}: {'':18} {'tokens/s':>9} {'(min to max)':>16} {'GB':>6} {'optimiser, ms':>14} {'over the best PyTorch':>22}")
    for name, result in results.items():
        speeds, of_best = result["tokens_per_second"], best("dense" in name)
        median, peak = statistics.median(speeds), max(result["peak_bytes"]) / 1e9
        optimizer = [seconds for seconds in result["optimizer_seconds"] if seconds is not None]
        optimizer = f"{1e3 * statistics.median(optimizer):.1f}" if optimizer else ""
        ratio = f"{median / of_best:.2f}" if of_best else ""
        result["ratio_to_best_pytorch"] = median / of_best if of_best else None
        span = f"({min(speeds):.0f} to {max(speeds):.0f})"
        print(f"{name:25} {median:9.0f} {span:>16} {peak:6.2f} {optimizer:>14} {ratio:>22}")
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "")
    report = {"cpu": cpu, "cores": os.cpu_count(), "amx": "amx_bf16" in flags, "avx512_bf16": "avx512_bf16" in flags,
              "shape": shape, "steps": steps, "results": results}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
