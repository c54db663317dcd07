"""Loss curves from the same weights and the same tokens: Moebius in f32 and in bf16, and PyTorch.

    pip install -r bench/requirements.txt
    cargo build --release && cargo build --release -p moebius-train --example beginning
    python bench/curves_vs_pytorch.py [--steps 200] [--rate 5e-4] [--autocast] [--out FILE.json]

The model is recipes/small.toml, 4096 tokens a step, with a lower learning rate: at the recipe's own, runs that differ in
the last bit are 0.1 nats apart at single steps after forty, whoever computes them. `beginning` writes the first weights and the tokens of every step;
PyTorch (transformers' Mixtral, f32) takes the same steps: AdamW with the recipe's constants and our learning rates, decay on
the same weights, the same clipping, the balance loss of each layer averaged over layers, and the z-loss. --autocast adds
PyTorch's own bf16, to see what rounding costs there. Printed: the cross-entropy of the steps, and the largest and the mean
difference between the curves, bf16 to its own side's f32. Exit status 0 only if the mean over each 20 steps of ours, and of
PyTorch's f32, differs by at most 0.01 nats.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEQUENCES, WINDOW, TOLERANCE = 16, 20, 0.01


def recipe(precision, steps, rate):
    text = (ROOT / "recipes/small.toml").read_text()
    text = re.sub(r'"\.\./data', f'"{ROOT}/data', text)
    keys = {"steps": steps, "save_every": steps, "validate_every": steps, "sequences": SEQUENCES,
            "precision": f'"{precision}"', "learning_rate": rate, "minimum_learning_rate": rate / 10}
    for key, value in keys.items():
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    return text


def moebius(folder, precision, steps, rate):
    path = folder / f"{precision}.toml"
    path.write_text(recipe(precision, steps, rate))
    command = [ROOT / "target/release/moebius", "train", path, "--out", folder / precision]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in open(folder / precision / "metrics.jsonl")]
    return [line for line in lines if line["kind"] == "step"]


def pytorch(folder, rates, autocast):
    import numpy
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.set_num_threads(2)
    subprocess.run([ROOT / "target/release/examples/beginning", folder / "f32.toml", folder / "beginning"], check=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "beginning/model", dtype=torch.float32).train()
    experts, top_k = model.config.num_local_experts, model.config.num_experts_per_tok
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    tokens = numpy.fromfile(folder / "beginning/tokens.u32", dtype="<u4").astype(numpy.int64)
    tokens = torch.from_numpy(tokens).reshape(len(rates), SEQUENCES, -1)
    losses = []
    for batch, rate in zip(tokens, rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(batch[:, :-1], output_router_logits=True)
        loss = cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        layers = [logits.float() for logits in out.router_logits]
        balance = sum(load_balancing_loss_func((logits,), experts, top_k) for logits in layers) / len(layers)
        z = sum(logits.logsumexp(-1).square().mean() for logits in layers) / len(layers)
        (loss + 0.01 * balance + 0.001 * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--autocast", action="store_true", help="PyTorch in bf16 too")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs = {precision: moebius(folder, precision, options.steps, options.rate) for precision in ("f32", "bf16")}
        curves = {f"moebius {precision}": [step["loss"] for step in run] for precision, run in runs.items()}
        rates = [step["learning_rate"] for step in runs["f32"]]
        curves["pytorch f32"] = pytorch(folder, rates, False)
        if options.autocast:
            curves["pytorch bf16"] = pytorch(folder, rates, True)
    names = list(curves)
    print(f"{'step':>6}" + "".join(f"{name:>15}" for name in names))
    for step in sorted({1, *range(WINDOW, options.steps + 1, WINDOW)}):
        print(f"{step:6}" + "".join(f"{curves[name][step - 1]:15.4f}" for name in names))
    worst = 0.0
    for name, other in [(names[1], names[0]), (names[2], names[0]), (names[-1], names[2])][:len(names) - 1]:
        differences = [a - b for a, b in zip(curves[name], curves[other])]
        windows = [statistics.mean(differences[at:at + WINDOW]) for at in range(0, len(differences), WINDOW)]
        largest = max(windows, key=abs)
        worst = worst if name == "pytorch bf16" else max(worst, abs(largest))
        print(f"{name} less {other}: mean {statistics.mean(differences):+.5f}, one step at most "
              f"{max(differences, key=abs):+.5f}, mean of {WINDOW} steps at most {largest:+.5f}")
    if options.out:
        options.out.write_text(json.dumps(curves) + "\n")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
