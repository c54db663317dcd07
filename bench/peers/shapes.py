"""The shapes that are compared: published models, whole or cut to their first layers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a sparse decoder, and how its attention differs from Llama's."""

    name: str
    gguf_architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    width: int
    vocab: int
    rope_theta: float
    renormalise: bool
    # Norms of queries and keys: over the whole row ("row"), over each head ("head"), or none.
    query_key_norm: str | None

    @property
    def parameters(self):
        heads = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        experts = self.experts * (3 * self.width + 1) * self.hidden
        return 2 * self.vocab * self.hidden + self.layers * (heads + experts)


PUBLISHED = {
    shape.name: shape
    for shape in (
        Shape("olmoe-1b-7b", "olmoe", 16, 2048, 16, 16, 128, 64, 8, 1024, 50304, 1e4, False, "row"),
        Shape("qwen3-30b-a3b", "qwen3moe", 48, 2048, 32, 4, 128, 128, 8, 768, 151936, 1e6, True, "head"),
        Shape("mixtral-8x7b", "llama", 32, 4096, 32, 8, 128, 8, 2, 14336, 32000, 1e6, True, None),
    )
}


def parse(text):
    """The shape that `name` or `name:layers` says; `name:layers:vocab` cuts the vocabulary too."""
    name, *cuts = text.split(":")
    if name not in PUBLISHED or len(cuts) > 2:
        known = ", ".join(PUBLISHED)
        raise SystemExit(f"{text}: wanted one of {known}, with :LAYERS or :LAYERS:VOCAB behind it")
    shape = PUBLISHED[name]
    for field, cut in zip(("layers", "vocab"), cuts):
        whole = getattr(shape, field)
        if not cut.isdigit() or not 1 <= int(cut) <= whole:
            raise SystemExit(f"{text}: wanted 1 to {whole} {field}, found {cut}")
        shape = dataclasses.replace(shape, **{field: int(cut)})
    return dataclasses.replace(shape, name=text.replace(":", "-"))
