"""Writes the tokenizers of GGUF files as JSON, for `cargo run --release -p moebius-engine --example tokenizer_vectors`.

    python bench/tokenizer_vectors.py llama.cpp/models out

takes every ggml-vocab-*.gguf that has a .inp and a .out beside it (llama.cpp ships them, the source package of
llama-cpp-python too). Needs the package `gguf`.
"""

import json
import shutil
import sys
from pathlib import Path

from gguf import GGUFReader


def parts(path):
    fields = GGUFReader(path).fields

    def value(name, default=None):
        field = fields.get(f"tokenizer.{name}")
        return default if field is None else field.contents()

    return {
        "model": value("ggml.model"),
        "pre": value("ggml.pre"),
        "tokens": value("ggml.tokens", []),
        "scores": value("ggml.scores", []),
        "token_types": value("ggml.token_type", []),
        "merges": value("ggml.merges", []),
        "bos": value("ggml.bos_token_id"),
        "eos": value("ggml.eos_token_id"),
        "unknown": value("ggml.unknown_token_id"),
        "add_bos": value("ggml.add_bos_token"),
        "add_eos": value("ggml.add_eos_token"),
        "add_space_prefix": value("ggml.add_space_prefix"),
        "chat_template": value("chat_template"),
    }


def main():
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("ggml-vocab-*.gguf")):
        vectors = [path.with_name(path.name + suffix) for suffix in (".inp", ".out")]
        if all(vector.exists() for vector in vectors):
            name = path.stem.removeprefix("ggml-vocab-")
            (target / f"{name}.json").write_text(json.dumps(parts(path), ensure_ascii=False))
            for vector in vectors:
                shutil.copy(vector, target / f"{name}{vector.suffix}")


main()
