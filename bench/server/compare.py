"""Moebius' server against llama.cpp's: the same file, the same threads, one after the other, loaded by `moebius load`.

    python bench/server/compare.py --gguf FILE --llama-server PATH [--moebius target/release/moebius]

Prints, for each round and side: output tokens a second and time to first token of parallel requests; then, of Moebius
alone: what a shared beginning saves, the time of a step that is not the model's, and bytes of expert weights a token by
the number of sequences. llama.cpp's own server takes `-np` sequences at once; llama-cpp-python's takes one at a time.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

import judge


@contextlib.contextmanager
def server(command, url, log):
    """A running server, ended with the block."""
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        for _ in range(1200):
            if process.poll() is not None:
                sys.exit(f"{command[0]} ended by itself, see {log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url + "/health", timeout=1)
                break
            time.sleep(0.1)
        else:
            sys.exit(f"{command[0]} is not ready, see {log}")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def load(options, url, **more):
    """What `moebius load` reports."""
    flags = {"requests": options.parallel, "concurrency": options.parallel, "prompt-tokens": options.prompt, "max-tokens": options.answer, "seed": 1, **more}
    command = [options.moebius, "load", "--url", url, "--json", "--endpoint", "completions", "--extra", '{"ignore_eos": true, "temperature": 0.8}']
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def first_token(url, model, prompt):
    """Seconds to the first piece of text, by a client that keeps its clock."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 2, "stream": True, "temperature": 0, "ignore_eos": True})
    request = urllib.request.Request(url + "/v1/completions", body.encode(), {"content-type": "application/json"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                return time.perf_counter() - begun
    raise RuntimeError("an answer without text")


def of_length(url, tokens, word):
    """A text of about so many tokens, by the server's own count."""
    count = lambda n: judge.post(url, "/tokenize", {"prompt": f"{word} " * n})[1]["count"]
    few, many = count(10), count(30)
    return f"{word} " * round(10 + (tokens - few) * 20 / (many - few))


def own_figures(options, url):
    """What only our server tells."""
    card = judge.get(url, "/v1/moebius/model")
    before = judge.get(url, "/v1/moebius/stats")
    report = load(options, url, seed=77)
    after = judge.get(url, "/v1/moebius/stats")
    steps = {name: after["steps"][name] - before["steps"][name] for name in ("count", "seconds", "model_seconds")}
    print(f"steps: {steps['count']}, {steps['seconds']:.2f} s, of which not in the model {1 - steps['model_seconds'] / steps['seconds']:.2%}; wall time not in the model {1 - steps['model_seconds'] / report['seconds']:.2%}")
    ratios = []
    for number in range(options.rounds):
        prefix = of_length(url, 1000, f"prefix{number}")
        cold = first_token(url, card["name"], prefix + "one")
        warm = first_token(url, card["name"], prefix + "two")
        ratios.append(warm / cold)
        print(f"shared beginning of about 1,000 tokens: first token after {cold * 1e3:.0f} ms, then {warm * 1e3:.0f} ms ({warm / cold:.1%})")
    print(f"median {statistics.median(ratios):.1%}")
    for group in after["expert_bytes_by_sequences"]:
        most = group["most_sequences"]
        if group["tokens"]:
            print(f"steps of up to {most or 'more'} sequences: {group['expert_bytes_per_token'] / 1e6:.1f} MB of experts a token ({group['steps']} steps)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--llama-server")
    parser.add_argument("--moebius", default="target/release/moebius")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cache", default="3GiB", help="memory for keys and values")
    parser.add_argument("--own", action="store_true", help="also what only our server tells")
    parser.add_argument("--logs", default="/tmp")
    options = parser.parse_args()
    ports = {"moebius": 8711, "llama.cpp": 8712}
    # Room for each sequence, the made-up prompts' trial included.
    context = options.parallel * max(1024, options.prompt + options.answer + 64)
    commands = {
        "moebius": [options.moebius, "--threads", str(options.threads), "serve", "--model", options.gguf, "--port", "8711", "--cache-memory", options.cache, "--max-time", "3600", "--log", "warn"],
        "llama.cpp": [options.llama_server, "-m", options.gguf, "--port", "8712", "-t", str(options.threads), "-tb", str(options.threads), "-np", str(options.parallel), "-c", str(context), "--no-webui"],
    }
    if not options.llama_server:
        del commands["llama.cpp"]
    results = {side: [] for side in commands}
    for _ in range(options.rounds):
        for side, command in commands.items():
            url = f"http://127.0.0.1:{ports[side]}"
            with server(command, url, os.path.join(options.logs, f"server-{side}.log")):
                load(options, url, requests=2, concurrency=2, seed=5, **{"max-tokens": 8})
                report = load(options, url)
                results[side].append(report)
                first = report["first_token_ms"]
                print(f"{side:10} {report['output_tokens_per_second']:8.1f} output tokens/s, first token p50 {first['p50']:.0f} p95 {first['p95']:.0f} ms, {report['answered']}/{report['requests']} answered, {report['prompt_tokens']} prompt tokens", flush=True)
                if side == "moebius" and options.own:
                    own_figures(options, url)
    if len(results) == 2:
        median = lambda side, *path: statistics.median(_at(report, path) for report in results[side])
        rate = median("moebius", "output_tokens_per_second") / median("llama.cpp", "output_tokens_per_second")
        wait = median("moebius", "first_token_ms", "p95") / median("llama.cpp", "first_token_ms", "p95")
        print(f"moebius against llama.cpp: {rate:.2f} times the output tokens/s, first token p95 {wait:.2f} times")


def _at(report, path):
    for name in path:
        report = report[name]
    return report


main()
