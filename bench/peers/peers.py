"""Running a sparse model: Moebius against llama.cpp (and transformers) on the same shapes, in one run, alternating.

    pip install -r bench/peers/requirements.txt          (builds llama.cpp, some minutes)
    cargo build --release
    python bench/peers/peers.py --work FOLDER [--shapes olmoe-1b-7b,qwen3-30b-a3b:12,mixtral-8x7b:4]
        [--formats Q4_0,Q4_K_M,Q8_0] [--sides moebius,llama] [--rounds 3] [--threads 2] [--batch 16] [--out FILE.json]

FOLDER gets a GGUF file of random weights for each shape and format (3 to 9 GB each) and keeps it only with --keep. Every
measurement is a process of its own, sides take turns, and a table gives medians, extremes and the ratio of each pair of
neighbours. A side is `moebius`, `moebius-avx2` or `moebius-avx512` (MOEBIUS_ISA), `llama`, `llama=DIR` (another build of
llama-cpp-python, installed with pip's --target), or `transformers`. Leave the machine otherwise idle.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import random_gguf
import shapes

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COLUMNS = ("prefill", "decode", "batched decode")


# A measurement is repeated when others took more of the machine than this, at most so often.
DISTURBED, REPEATS = 0.04, 2


def busy_seconds():
    """Seconds that all processors worked, for us or others, and that a hypervisor kept them from us."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, interrupt, soft, steal = map(int, file.readline().split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupt + soft) / ticks, steal / ticks


def run(command, environment):
    """The JSON object that a measurement prints, and the shares of the machine that others and a hypervisor took."""
    for _ in range(REPEATS + 1):
        before, stolen_before = busy_seconds()
        own_before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"exit status {done.returncode}: {last[0]}")
        after, stolen = busy_seconds()
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_seconds = own.ru_utime + own.ru_stime - own_before.ru_utime - own_before.ru_stime
        available = (time.time() - start) * os.cpu_count()
        found = json.loads(done.stdout[done.stdout.index("{") :])
        found["others_share"] = max(0.0, after - before - own_seconds) / available
        found["stolen_share"] = (stolen - stolen_before) / available
        if found["others_share"] + found["stolen_share"] <= DISTURBED:
            break
    else:
        print(f"  disturbed: others {found['others_share']:.0%}, hypervisor {found['stolen_share']:.0%}", flush=True)
    return found


def measure_llama(options, side, model):
    command = [sys.executable, str(HERE / "llama_side.py"), str(model), "--prefill", str(options.prefill)]
    command += ["--decode", str(options.decode), "--threads", str(options.threads), "--batch", str(options.batch)]
    folder = side.partition("=")[2]
    found = run(command, {"PYTHONPATH": folder} if folder else {})
    rates = {"prefill": found["prefill_tokens_per_second"], "decode": found["decode_tokens_per_second"]}
    if "batched_decode_tokens_per_second" in found:
        rates["batched decode"] = found["batched_decode_tokens_per_second"]
    return rates, found


def measure_moebius(options, side, model):
    command = [str(options.moebius), "bench", "--model", str(model), "--prefill", str(options.prefill)]
    command += ["--decode", str(options.decode), "--threads", str(options.threads), "--rounds", "1", "--json"]
    command += ["--batch", str(options.batch)] if options.batch > 1 else []
    isa = side.partition("-")[2]
    found = run(command, {"MOEBIUS_ISA": isa} if isa else {})
    keys = (("prefill", "prefill"), ("decode", "decode"), ("batched decode", "batched_decode"))
    rates = {name: found[key]["tokens_per_second"]["median"] for name, key in keys if found.get(key)}
    return rates, found


def measure_transformers(options, shape):
    command = [sys.executable, str(HERE / "transformers_side.py"), shape, "--prefill", str(options.prefill)]
    command += ["--decode", str(options.decode), "--threads", str(options.threads)]
    found = run(command, {})
    return {"prefill": found["prefill_tokens_per_second"], "decode": found["decode_tokens_per_second"]}, found


def measure(options, side, shape, model):
    if side == "transformers":
        return measure_transformers(options, shape)
    return (measure_llama if side.startswith("llama") else measure_moebius)(options, side, model)


def check_load(shape, model):
    """Random weights may send most tokens to the same experts, which flatters caches: look before timing."""
    command = [sys.executable, str(HERE / "llama_side.py"), str(model), "--check-load", str(shape.top_k)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    layers = json.loads(done.stdout.strip().splitlines()[-1])
    worst = max(layers, key=lambda layer: layer["busiest"], default=None)
    if worst is None:
        return
    least = min(layer["effective"] for layer in layers)
    print(
        f"  load of 512 tokens: busiest expert {worst['busiest']:.2f} times the mean (layer {worst['layer']}), "
        f"at least {least:.1f} of {shape.experts} experts in effect",
        flush=True,
    )
    if least < 0.8 * shape.experts:
        raise SystemExit("the load is not even: a comparison would say little")


def prepare(options, shape, kind):
    """The GGUF file, written unless it is there; a file of this name is always whole."""
    path = options.work / f"{shape.name}-{kind}.gguf"
    if not path.exists():
        start = time.time()
        random_gguf.write(shape, kind, path)
        os.sync()  # writing goes on in the background otherwise, into the first measurement
        print(f"  {path.name}: {path.stat().st_size / 1e9:.2f} GB in {time.time() - start:.0f} s", flush=True)
    with open(path, "rb") as file:
        while file.read(1 << 24):  # into the page cache, where all sides find it
            pass
    return path


def compare(options, shape_name, kind):
    """All rounds of one shape and format: rates by side and column, and what each measurement printed."""
    shape = shapes.parse(shape_name)
    model = prepare(options, shape, kind)
    if not options.skip_load_check:
        check_load(shape, model)
    rates = {side: {column: [] for column in COLUMNS} for side in options.sides}
    reports = {side: [] for side in options.sides}
    for round_ in range(options.rounds):
        # Every second round runs backwards, so that no side is always the one that finds the machine warm.
        for side in options.sides[:: 1 if round_ % 2 == 0 else -1]:
            try:
                found, report = measure(options, side, shape_name, model)
            except (RuntimeError, ValueError, KeyError) as error:
                print(f"  {side}: {error!r}", file=sys.stderr, flush=True)
                continue
            reports[side].append(report)
            for column, rate in found.items():
                rates[side][column].append(rate)
    if not options.keep:
        model.unlink()
    return rates, reports


def table(options, rates):
    """Lines: medians with extremes, and the ratio to the first side, round by round."""
    first = options.sides[0]
    for column in COLUMNS:
        for side in options.sides:
            found = rates[side][column]
            if not found:
                continue
            line = f"  {column:<15} {side:<28} {statistics.median(found):8.1f} tokens/s"
            line += f"  ({min(found):.1f} to {max(found):.1f})"
            pairs = [ours / theirs for ours, theirs in zip(rates[first][column], found)]
            if side != first and pairs:
                line += f"  {first} is {statistics.median(pairs):.2f} times as fast"
                line += f" ({min(pairs):.2f} to {max(pairs):.2f})"
            print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the GGUF files")
    parser.add_argument("--shapes", default="olmoe-1b-7b,qwen3-30b-a3b:12,mixtral-8x7b:4")
    parser.add_argument("--formats", default="Q4_0,Q4_K_M,Q8_0")
    parser.add_argument("--sides", default="moebius,llama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="sequences that decode together; 0 leaves that out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--moebius", type=pathlib.Path, default=ROOT / "target" / "release" / "moebius")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file with every measurement")
    parser.add_argument("--keep", action="store_true", help="leave the GGUF files there")
    parser.add_argument("--skip-load-check", action="store_true")
    parser.add_argument("--only-write", action="store_true", help="make the GGUF files and stop")
    options = parser.parse_args()
    options.sides = options.sides.split(",")
    options.work.mkdir(parents=True, exist_ok=True)
    if ROOT in options.work.resolve().parents:
        raise SystemExit(f"--work {options.work}: wanted a folder outside the repository")
    results = []
    for shape in options.shapes.split(","):
        for kind in options.formats.split(","):
            print(f"{shape} {kind}, {options.threads} threads, {options.rounds} rounds", flush=True)
            if options.only_write:
                prepare(options, shapes.parse(shape), kind)
                continue
            rates, reports = compare(options, shape, kind)
            table(options, rates)
            results.append({"shape": shape, "format": kind, "rates": rates, "reports": reports})
    if options.out and results:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"machine": platform.processor() or platform.machine(), "threads": options.threads, "results": results}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


main()
