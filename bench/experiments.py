#!/usr/bin/env python3
"""The experiments of docs/experiments.md on routers and mixtures: trains each variant with each seed, prints one table.

    python bench/experiments.py NAME [--seeds N] [--steps N] [--out DIR] [--binary target/release/moebius]
        [--times] [--plot FILE.svg]

NAME: vision, balance, hash, depths, leak, methods; compared prints and plots what `moebius compare --out DIR` left in --out.
Needs nothing but Python and the binary; leak also the example `future_leak`
beside it. Runs that are done already in --out are read, not repeated.

--plot draws what the table says: a row a variant, a dot a seed.

Other programs on the machine change times, not losses. So times are apart: --times trains each variant for a few steps
with one seed, into another folder, and prints the milliseconds of a step; run it on a quiet machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def last(path, kind):
    """The last record of a kind in a run's log."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def train(binary, recipe, out):
    """Trains a recipe unless `out` holds its model; the log's records."""
    if not (out / "model").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.parent / f"{out.name}.toml"
        path.write_text(recipe)
        subprocess.run([binary, "train", path, "--out", out, "--force"], check=True, stdout=subprocess.DEVNULL)
    log = out / "metrics.jsonl"
    return last(log, "step"), last(log, "validation")


def milliseconds(steps):
    """The fastest step: the rest is what else the machine did."""
    return 1e3 * min(step["seconds"] for step in steps)


def plot(path, title, rows):
    """Rows (name, values) as an SVG of dots over one axis."""
    everything = [value for _, values in rows for value in values]
    low, high = min(everything), max(everything)
    margin = 0.05 * (high - low) or 1
    low, high = low - margin, high + margin
    left, right, top, line = 330, 700, 40, 24
    bottom = top + line * len(rows)

    def place(value):
        return left + (right - left) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + 20}" height="{bottom + 30}" font-family="sans-serif"'
        ' font-size="12" fill="#777">',
        f'<text x="{left}" y="20" fill="#777">{title}</text>',
    ]
    for number, (name, values) in enumerate(rows):
        y = top + line * number + line / 2
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{name}</text>')
        parts.append(f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="#bbb" stroke-width="0.5"/>')
        parts += [f'<circle cx="{place(value):.1f}" cy="{y}" r="4" fill="#27c" opacity="0.6"/>' for value in values]
        middle = place(statistics.mean(values))
        parts.append(f'<line x1="{middle:.1f}" y1="{y - 8}" x2="{middle:.1f}" y2="{y + 8}" stroke="#d40" stroke-width="2"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, value = left + share * (right - left), low + share * (high - low)
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{value:.4g}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def spread(values):
    """Mean and deviation between seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation


# --- images -----------------------------------------------------------------------------------------------------------

IMAGES = "/usr/share/datasets/fashion-mnist"

VISION = """
[vision]
hidden = 64
layers = 4
heads = 4
ffn = {ffn}
patch = 4
{block}

[data]
format = "idx"
train_images = "{images}/train-images-idx3-ubyte.gz"
train_labels = "{images}/train-labels-idx1-ubyte.gz"
valid_images = "{images}/t10k-images-idx3-ubyte.gz"
valid_labels = "{images}/t10k-labels-idx1-ubyte.gz"

[train]
seed = {seed}
steps = {steps}
images = 64
precision = "bf16"
validate_every = {steps}
save_every = {steps}
keep = 1

[optimizer]
learning_rate = 2e-3
minimum_learning_rate = 2e-5
warmup_steps = {warmup}
weight_decay = 0.05
"""


def routed(top_k, capacity, priority):
    return (
        f'block = "routed"\nsparse_layers = 2\nexperts = 8\nexperts_per_token = {top_k}\n\n[router]\nname = "vision"\n'
        f"capacity_factor = {capacity}\nbatch_priority = {str(priority).lower()}"
    )


# The inner width at which a dense step takes as long as one of V-MoE (--times says whether it does).
WIDE = 208

# Name, inner width of a network or expert, block. Top-2 has half the width, so that a token's arithmetic is the same.
VISION_VARIANTS = [
    ("dense", 128, ""),
    ("V-MoE, top-1, capacity 1.05", 128, routed(1, 1.05, False)),
    ("V-MoE, top-2, capacity 1.05", 64, routed(2, 1.05, False)),
    ("V-MoE, top-1, capacity 0.5, by priority", 128, routed(1, 0.5, True)),
    ("V-MoE, top-1, capacity 0.5, by order", 128, routed(1, 0.5, False)),
    ("Soft MoE, 8 experts of 6 slots", 128, 'block = "soft"\nsparse_layers = 2\nexperts = 8\nslots = 6'),
    ("dense, wider: steps as long as V-MoE's", WIDE, ""),
]


def vision(options):
    header(options, "| model | accuracy, % | SD | validation loss | SD |\n|---|---|---|---|---|")
    rows = []
    for number, (name, ffn, block) in enumerate(VISION_VARIANTS):
        accuracies, losses = [], []
        for seed in range(1, options.seeds + 1):
            warmup = min(100, options.steps // 2)
            recipe = VISION.format(ffn=ffn, block=block, images=IMAGES, seed=seed, steps=options.steps, warmup=warmup)
            steps, validations = train(options.binary, recipe, options.out / f"vision-{number}-{seed}")
            accuracies.append(100 * validations[-1]["accuracy"])
            losses.append(validations[-1]["loss"])
        if options.times:
            print(f"| {name} | {milliseconds(steps):.1f} |", flush=True)
            continue
        rows.append((name, accuracies))
        (accuracy, deviation), (loss, loss_deviation) = spread(accuracies), spread(losses)
        print(f"| {name} | {accuracy:.2f} | {deviation:.2f} | {loss:.4f} | {loss_deviation:.4f} |", flush=True)
    if options.plot:
        plot(options.plot, "accuracy on images held back, %", rows)


def header(options, line):
    print("| variant | ms a step |\n|---|---|" if options.times else line)


# --- text -------------------------------------------------------------------------------------------------------------

TEXT = """
[model]
hidden = 96
layers = 4
heads = 4
ffn = {ffn}
{experts}
context = 128

{router}

[tokenizer]
vocab_size = 2048

[data]
train = [{train}]
valid = [{valid}]

[train]
seed = {seed}
steps = {steps}
sequence_length = 128
sequences = 16
precision = "bf16"
validate_every = {steps}
validate_batches = 20
save_every = {steps}
keep = 1
export = "last"

[optimizer]
learning_rate = 3e-3
minimum_learning_rate = 3e-4
warmup_steps = {warmup}
"""

PARTS = ["en_prose", "en_bible", "en_drama", "en_speech", "en_jargon", "en_satire", "c_code", "es_bible"]


def text(options, out, seed, ffn, experts, router, steps=None):
    paths = {
        kind: ", ".join(f'"{ROOT}/data/small_pd/{part}.{kind}.txt"' for part in PARTS) for kind in ("train", "valid")
    }
    steps = steps or options.steps
    warmup = min(50, steps // 2)
    recipe = TEXT.format(ffn=ffn, experts=experts, router=router, seed=seed, steps=steps, warmup=warmup, **paths)
    return train(options.binary, recipe, options.out / f"{out}-{seed}")


def table(options, experiment, variants):
    """Trains (name, ffn, experts lines, router lines[, steps]) variants; losses, and balance over the validation text."""
    header(options, "| router | validation loss | SD | MaxVio, worst layer | idle experts |\n|---|---|---|---|---|")
    rows = []
    for number, (name, *recipe) in enumerate(variants):
        losses, violations, idle = [], [], []
        if options.times:
            recipe = recipe[:3]
        for seed in range(1, options.seeds + 1):
            steps, validations = text(options, f"{experiment}-{number}", seed, *recipe)
            losses.append(validations[-1]["loss"])
            load = validations[-1]["load"]
            violations.append(max((layer["max_violation"] for layer in load), default=0.0))
            idle.append(sum(layer["dead_experts"] for layer in load))
        if options.times:
            print(f"| {name} | {milliseconds(steps):.1f} |", flush=True)
            continue
        rows.append((name, losses))
        (loss, deviation), violation = spread(losses), spread(violations)[0]
        idle = f"{statistics.mean(idle):.1f}"
        print(f"| {name} | {loss:.4f} | {deviation:.4f} | {violation:.2f} | {idle} |", flush=True)
    if options.plot:
        plot(options.plot, "validation loss, nats a token", rows)


def sparse(experts, top_k):
    return f"experts = {experts}\nexperts_per_token = {top_k}"


def router(name, **options):
    def show(value):
        return f'"{value}"' if isinstance(value, str) else str(value).lower()

    return "\n".join(["[router]", f'name = "{name}"'] + [f"{key} = {show(value)}" for key, value in options.items()])


def balance(options):
    shape = (128, sparse(16, 2))
    loss_free = {"sequence": 0.0, "renormalise": True}
    table(options, "balance", [
        ("none", *shape, router("loss_free", rate=0.0, **loss_free)),
        ("auxiliary loss, 0.01", *shape, router("loss_free", rate=0.0, balance=0.01, **loss_free)),
        ("loss-free, rate 0.01", *shape, router("loss_free", rate=0.01, **loss_free)),
        ("both", *shape, router("loss_free", rate=0.01, balance=0.01, **loss_free)),
    ])


def hashing(options):
    variants = []
    for experts in (16, 64):
        shape = (128, sparse(experts, 1))
        variants += [
            (f"{experts} experts, hash, random", *shape, router("hash")),
            (f"{experts} experts, hash, balanced", *shape, router("hash", table="balanced")),
            (f"{experts} experts, Switch", *shape, router("switch", capacity_factor=1.25)),
        ]
    table(options, "hash", variants)


DEPTH_SHARE = 0.125


def depths(options):
    longer = round(options.steps * operations(1) / operations(DEPTH_SHARE))
    table(options, "depths", [
        ("dense", 256, "", ""),
        ("12.5 %, every other layer", 256, "", depth("threshold")),
        ("12.5 %, every other layer, random choice", 256, "", depth("random")),
        (f"12.5 %, every other layer, {longer} steps", 256, "", depth("threshold"), longer),
        (f"12.5 %, every other layer, random choice, {longer} steps", 256, "", depth("random"), longer),
    ])


def operations(share):
    """Multiplications and additions of a token's forward pass, as `moebius compare` counts them, with `share` of every other layer."""
    hidden, ffn, vocabulary, sequence = 96, 256, 2048, 128
    weights, seen = 4 * hidden**2 + 3 * hidden * ffn, (sequence + 1) / 2
    whole = 2 * weights + 4 * hidden * seen
    part = share * (2 * weights + 4 * hidden * (share * sequence + 1) / 2) + (2 * hidden if share < 1 else 0)
    return 2 * whole + 2 * part + 2 * vocabulary * hidden


def depth(sampler):
    return f'[depths]\nshare = {DEPTH_SHARE}\nevery = 2\nsampler = "{sampler}"'


def methods(options):
    """Every method of docs/routers on the same small task."""
    two, one = (128, sparse(16, 2)), (128, sparse(16, 1))
    future = {"allow_future_leak": True}
    table(options, "methods", [
        ("top_k", *two, router("top_k")),
        ("top_k, raw", *two, router("top_k", renormalise=False)),
        ("top_k, softmax of the chosen", *two, router("top_k", score="softmax_of_chosen")),
        ("top_k, sparse mixer", *two, router("top_k", score="sparse_mixer")),
        ("top_k of 1, Llama 4's", *one, router("top_k", score="sigmoid_of_chosen", weighs_input=True)),
        ("noisy_top_k", *two, router("noisy_top_k")),
        ("hierarchical, 4 groups", *two, router("hierarchical", groups=4)),
        ("switch", *one, router("switch")),
        ("gshard", *two, router("gshard")),
        ("vision", *two, router("vision")),
        ("loss_free, rate 0.01", *two, router("loss_free", rate=0.01)),
        ("deepseek_v2, 4 devices", *two, router("deepseek_v2", devices=4, devices_per_token=2)),
        ("hash", *one, router("hash")),
        ("hash, counted", *one, router("hash", table="counted")),
        ("forced", *two, router("forced")),
        ("expert_choice (sees the future)", *two, router("expert_choice", **future)),
        ("base (trained on the batch)", *one, router("base", **future)),
        ("sinkhorn (trained on the batch)", *two, router("sinkhorn", **future)),
    ])


def leak(options):
    """Expert choice sees the future: the loss of windows read at once, and of the same read from left to right."""
    shape = (128, sparse(16, 2))
    header(options, "| router | read at once | SD | from left to right | SD |\n|---|---|---|---|---|")
    rows = []
    for number, (name, lines) in enumerate([
        ("top-k", router("top_k")),
        ("expert choice", router("expert_choice", allow_future_leak=True)),
    ]):
        found = []
        for seed in range(1, options.seeds + 1):
            out = options.out / f"leak-{number}-{seed}"
            steps, _ = text(options, f"leak-{number}", seed, *shape, lines)
            if options.times:
                continue
            command = [options.binary.parent / "examples" / "future_leak", out / "model",
                       ROOT / "data" / "small_pd" / "en_prose.valid.txt", "16", "128"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            found.append([float(printed[i - 1]) for i, word in enumerate(printed) if word == "nats" or word == "nats,"])
        if options.times:
            print(f"| {name} | {milliseconds(steps):.1f} |", flush=True)
            continue
        rows += [(f"{name}, {way}", values) for way, values in zip(["at once", "from left to right"], zip(*found))]
        columns = " | ".join(f"{mean:.4f} | {deviation:.4f}" for mean, deviation in map(spread, zip(*found)))
        print(f"| {name} | {columns} |", flush=True)
    if options.plot:
        plot(options.plot, "loss on held-back text, nats a token", rows)


def compared(options):
    """The tables of a comparison that is there, and a plot of every seed at each budget."""
    found = json.loads((options.out / "compare.json").read_text())
    print("| recipe | parameters | active | FLOP a token | tokens/s |\n|---|---|---|---|---|")
    for side in found["sides"]:
        print(f"| `{side['name']}` | {side['total_parameters']:,} | {side['active_parameters']:,} | "
              f"{side['flops_per_token']:.3g} | {side['tokens_per_second']:,.0f} |")
    tables = [(f"equal {at['budget']}: {at['amount']:.4g}", at["rows"]) for at in found["budgets"]]
    points = []
    for title, rows in [*tables, ("equal total parameters, equal steps", found["equal_total_parameters"])]:
        seeds = " | ".join(f"seed {seed}" for seed in found["seeds"])
        print(f"\nat {title}\n\n| recipe | against | loss | difference | {seeds} |\n|---|---|---|---|{'---|' * len(found['seeds'])}")
        for row in rows:
            if None in row["losses"]:
                continue
            mean, deviation = spread(row["losses"])
            cells = [f"`{row['name']}`", f"`{row['against']}`", f"{mean:.4f} ± {deviation:.4f}", ""]
            if row["name"] != row["against"]:
                mean, deviation = spread(row["differences"])
                cells[3] = f"{mean:+.4f} ± {deviation:.4f}"
            cells += [f"{difference:+.4f}" if cells[3] else "" for difference in row["differences"]]
            print(f"| {' | '.join(cells)} |")
            points.append((f"{row['name']}, {title.split(':')[0]}", row["losses"]))
    if options.plot:
        plot(options.plot, "validation loss, nats a token", points[: sum(len(rows) for _, rows in tables)])


EXPERIMENTS = {"compared": compared, "vision": vision, "balance": balance, "hash": hashing, "depths": depths, "leak": leak, "methods": methods}
TIMED_STEPS = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments")
    parser.add_argument("--binary", type=Path, default=ROOT / "target" / "release" / "moebius")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--times", action="store_true", help="only the time of a step, measured by a few of them")
    options = parser.parse_args()
    if options.times:
        options.plot = None
        options.seeds, options.steps, options.out = 1, TIMED_STEPS, options.out / "times"
    if not options.binary.exists():
        sys.exit(f"{options.binary}: no such file; cargo build --release")
    EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    main()
