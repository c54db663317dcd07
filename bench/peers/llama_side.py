"""llama.cpp's side: measures one GGUF file in a process of its own and prints one JSON object.

    python llama_side.py MODEL.gguf --prefill 512 --decode 64 --threads 2 [--batch 16] [--check-load]

Token ids are random; a model of random weights has nothing to say. The first prefill and the first decoded tokens warm
up and are not counted.
"""

import argparse
import ctypes
import json
import resource
import sys
import time

import llama_cpp
import numpy as np


class Context:
    """A model with room for some sequences."""

    def __init__(self, path, arguments, sequences, positions, callback=None):
        model = llama_cpp.llama_model_default_params()
        model.use_mmap = True
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        context = llama_cpp.llama_context_default_params()
        # Context a sequence and the compute buffers come in steps of 256.
        context.n_ctx = -(-positions // 256) * 256 * sequences
        context.n_batch = context.n_ubatch = 512
        context.n_seq_max = sequences
        context.n_threads = context.n_threads_batch = arguments.threads
        if callback is not None:
            context.cb_eval = callback
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp makes no context of {context.n_ctx} tokens")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.random = np.random.default_rng(1)

    def decode(self, sequences, first_position, tokens):
        """Reads `tokens` random tokens of each sequence, logits of the last one each."""
        batch, at = self.batch, 0
        for sequence in sequences:
            for offset in range(tokens):
                batch.token[at] = int(self.random.integers(259, self.vocab))
                batch.pos[at] = first_position + offset
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = offset + 1 == tokens
                at += 1
        batch.n_tokens = at
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode gave {status}")
        # Reading a logit waits until it is there.
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        if not np.isfinite(logits[0]):
            raise SystemExit("llama.cpp's logits are not finite")

    def clear(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def close(self):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def timed(body):
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def measure(arguments):
    """Tokens a second of prefill, decode and batched decode."""
    positions = arguments.prefill + arguments.decode + 8
    start = time.perf_counter()
    context = Context(arguments.model, arguments, 1, positions)
    load = time.perf_counter() - start
    first = timed(lambda: context.decode([0], 0, 16))
    context.clear()

    def prefill():
        for at in range(0, arguments.prefill, 512):
            context.decode([0], at, min(512, arguments.prefill - at))

    seconds = timed(prefill)
    for warm_up in range(4):
        context.decode([0], arguments.prefill + warm_up, 1)
    at = arguments.prefill + 4
    decode = timed(lambda: [context.decode([0], at + step, 1) for step in range(arguments.decode)])
    context.close()
    result = {
        "load_seconds": load,
        "first_seconds": first,
        "prefill_tokens_per_second": arguments.prefill / seconds,
        "decode_tokens_per_second": arguments.decode / decode,
    }
    if arguments.batch > 1:
        result["batched_decode_tokens_per_second"] = measure_batch(arguments)
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def measure_batch(arguments):
    """Several sequences of 32 tokens that decode together."""
    sequences, prefix, steps = range(arguments.batch), 32, arguments.batch_steps
    context = Context(arguments.model, arguments, arguments.batch, prefix + steps + 8)
    for sequence in sequences:
        context.decode([sequence], 0, prefix)
    for warm_up in range(2):
        context.decode(sequences, prefix + warm_up, 1)
    seconds = timed(lambda: [context.decode(sequences, prefix + 2 + step, 1) for step in range(steps)])
    context.close()
    return arguments.batch * steps / seconds


def expert_load(arguments, top_k):
    """How evenly the tokens of a prefill spread, layer by layer: the busiest expert's share of an even one's."""
    ggml = ctypes.CDLL(next(path for path in _libraries() if "ggml-base" in path))
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_nelements.restype = ctypes.c_int64
    for function in (ggml.ggml_get_name, ggml.ggml_nelements):
        function.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    logits = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def callback(tensor, ask, _):
        name = ggml.ggml_get_name(tensor).decode()
        if not name.startswith("ffn_moe_logits-"):
            return not ask
        if not ask:
            values = np.empty(ggml.ggml_nelements(tensor), np.float32)
            ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            logits[int(name.split("-")[1])] = values
        return True

    context = Context(arguments.model, arguments, 1, 512, callback)
    context.decode([0], 0, 512)
    context.close()
    report = []
    for layer in sorted(logits):
        # The last layer computes only the rows whose logits are wanted.
        tokens = 512 if layer + 1 < len(logits) else 1
        scores = logits[layer].reshape(tokens, -1)
        chosen = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
        counts = np.bincount(chosen.ravel(), minlength=scores.shape[1])
        if tokens > 1:
            share = np.maximum(counts, 1e-9) / counts.sum()
            busiest = counts.max() / counts.mean()
            report.append({"layer": layer, "busiest": busiest, "effective": float(np.exp(-(share * np.log(share)).sum()))})
    return report


def _libraries():
    """The shared libraries that this process has loaded."""
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[-1] for line in maps if ".so" in line})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--batch-steps", type=int, default=16)
    parser.add_argument("--check-load", type=int, metavar="TOP_K", default=0)
    arguments = parser.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(level, text, _):
        if level == 4:
            print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    if arguments.check_load:
        print(json.dumps(expert_load(arguments, arguments.check_load)))
    else:
        features = llama_cpp.llama_print_system_info().decode()
        print(json.dumps({**measure(arguments), "features": features}))


main()
