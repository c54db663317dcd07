"""One layer of experts, forward and backward, in milliseconds: Moebius against PyTorch, alternating.

    pip install -r bench/requirements.txt
    cargo build --release -p moebius-moe --example layer_bench
    python bench/layer_vs_pytorch.py [--rounds 3] [--seconds 3]

2048 tokens of width 1024, 32 experts, 4 a token, inner width 512, two threads, bf16 operands: gradients of the input and of
all weights. `moebius` is crates/moe/examples/layer_bench.rs. PyTorch runs transformers' MixtralExperts with its
`grouped_mm` and its eager implementation, weights and input in bf16, and the same by a plain loop over experts that reads
each expert's rows with index_select. Routing is given and even but for chance, the same on all sides: what is timed is the
experts. Each side is a process of its own, which warms up and then repeats until its time is over; its figure is the
median. `dense` is one SwiGLU network of the same active width in PyTorch. Leave the machine otherwise idle.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS, HIDDEN, EXPERTS, TOP_K, WIDTH = 2048, 1024, 32, 4, 512
KINDS = ["grouped_mm", "eager", "loop", "dense"]


def repeat(function, seconds):
    """Milliseconds of each call, after three to warm up."""
    for _ in range(3):
        function()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def pytorch(kind, seconds):
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral

    from train_vs_pytorch import plain_loop

    torch.set_num_threads(2)
    torch.manual_seed(0)
    if kind == "loop":
        plain_loop()
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS,
                           num_experts_per_tok=TOP_K)
    config._experts_implementation = "eager" if kind in ("loop", "dense") else kind
    if kind == "dense":
        config.intermediate_size = TOP_K * WIDTH
        gate_up = torch.nn.Linear(HIDDEN, 2 * TOP_K * WIDTH, bias=False, dtype=torch.bfloat16)
        down = torch.nn.Linear(TOP_K * WIDTH, HIDDEN, bias=False, dtype=torch.bfloat16)
        parameters = [gate_up.weight, down.weight]

        def layer(x):
            gate, up = gate_up(x).chunk(2, -1)
            return down(torch.nn.functional.silu(gate) * up)
    else:
        experts = modeling_mixtral.MixtralExperts(config).to(torch.bfloat16)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        parameters = list(experts.parameters())
        scores = torch.rand(TOKENS, EXPERTS)
        weights, index = scores.topk(TOP_K, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)

        def layer(x):
            return experts(x, index, weights)

    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)

    def forward():
        with torch.no_grad():
            layer(x)

    def both():
        for tensor in [x, *parameters]:
            tensor.grad = None
        layer(x).backward(dy)

    print(json.dumps({"forward": repeat(forward, seconds), "both": repeat(both, seconds)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--pytorch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pytorch:
        return pytorch(arguments.pytorch, arguments.seconds)
    ours = [str(ROOT / "target/release/examples/layer_bench"), "--threads", "2", "--seconds", str(arguments.seconds)]
    sides = {"moebius bf16": ours, "moebius f32": [*ours, "--f32"]}
    sides |= {f"pytorch {kind}": [sys.executable, __file__, "--pytorch", kind, "--seconds", str(arguments.seconds)]
              for kind in KINDS}
    found = {name: {"forward": [], "both": []} for name in sides}
    peak = None
    for _ in range(arguments.rounds):
        for name, command in sides.items():
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(out.splitlines()[-1])
            peak = result.get("bf16_peak", peak)
            for what in ("forward", "both"):
                found[name][what].append(statistics.median(result[what]))
            print(f"  {name}: {found[name]['both'][-1]:.1f} ms", file=sys.stderr, flush=True)
    operations = 3 * 2 * TOKENS * TOP_K * 3 * HIDDEN * WIDTH
    grouped = statistics.median(found["pytorch grouped_mm"]["both"])
    print(f"{'':20} {'forward, ms':>12} {'with backward, ms':>18} {'GFLOP/s':>9} {'of bf16 peak':>13} {'grouped_mm over it':>19}")
    for name, times in found.items():
        forward, both = (statistics.median(times[what]) for what in ("forward", "both"))
        rate = operations / both * 1e3
        print(f"{name:20} {forward:12.1f} {both:18.1f} {rate / 1e9:9.0f} {100 * rate / peak:11.0f} % {grouped / both:19.2f}")


if __name__ == "__main__":
    main()
