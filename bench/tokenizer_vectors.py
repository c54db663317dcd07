"""Writes the tokenizers of GGUF files as JSON, for `cargo run --release -p moebius-engine --example tokenizer_vectors`.

    python bench/tokenizer_vectors.py llama.cpp/models out

takes every ggml-vocab-*.gguf that has a .inp and a .out beside it (llama.cpp ships them, the source package of
llama-cpp-python too). Further arguments are SentencePiece models and tekken.json files (mistral-common ships some), whose
ids SentencePiece and tiktoken give for the texts of the fixtures. Needs the packages `gguf`, `sentencepiece`, `tiktoken`.
"""

import base64
import json
import re
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


BETWEEN = "\n__ggml_vocab_test__\n"


def texts():
    """Every text of the fixtures, and all of them as one."""
    fixtures = Path(__file__).parent.parent / "crates/engine/tests/fixtures/sentencepiece.json"
    texts = [case["text"] for case in json.loads(fixtures.read_text())["bpe"]]
    return texts + ["".join(texts) * 3]


def encoder(path):
    """The text to ids of the file's own library."""
    if path.suffix == ".json":
        import tiktoken

        tekken = json.loads(path.read_text())
        special = tekken["config"]["default_num_special_tokens"]
        kept = tekken["vocab"][: tekken["config"]["default_vocab_size"] - special]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in kept}
        encoding = tiktoken.Encoding("tekken", pat_str=tekken["config"]["pattern"], mergeable_ranks=ranks,
                                     special_tokens={})
        return lambda text: [rank + special for rank in encoding.encode(text)]
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


def other(path, target):
    folder = target / re.sub(r"[^A-Za-z0-9]+", "-", path.name)
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / ("tekken.json" if path.suffix == ".json" else "tokenizer.model"))
    encode = encoder(path)
    (folder / "vectors.inp").write_bytes(BETWEEN.join(texts()).encode())
    (folder / "vectors.out").write_text("".join(" ".join(map(str, encode(text))) + "\n" for text in texts()))


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
    for path in map(Path, sys.argv[3:]):
        other(path, target)


main()
