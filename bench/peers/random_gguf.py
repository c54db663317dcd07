"""Writes a GGUF file of random weights in a real shape: `write(shape, kind, path)`."""

import pathlib

import gguf
import numpy as np
import random_blocks

KINDS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")


def _more_bits(layer, layers):
    """The layers for which llama.cpp's Q4_K_M and Q5_K_M mixtures take Q6_K: the first and last eighth, every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _format(kind, name, layer, shape):
    """The format of a matrix. Mixtures: as llama.cpp's, but that all of attention's output stays in the smaller format."""
    if not kind.endswith("_K_M"):
        return kind
    if name == "output":
        return "Q6_K"
    if name in ("attn_v", "attn_k") and shape.experts == 8:
        return "Q8_0"
    if name in ("attn_v", "ffn_down_exps") and _more_bits(layer, shape.layers):
        return "Q6_K"
    return kind.removesuffix("_M")


def _tensors(shape):
    """Name, shape (None for the format: f32) and deviation of every tensor, in the order of the file.

    The embedding dominates the residual stream: every token then keeps a direction of its own up to the last layer,
    and routers spread tokens as evenly as a balanced model's do.
    """
    hidden, width, experts = shape.hidden, shape.width, shape.experts
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd", (shape.vocab, hidden), 1.0, False
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm", (hidden,), None, True
        yield block + "attn_q", (queries, hidden), hidden**-0.5, False
        yield block + "attn_k", (keys, hidden), hidden**-0.5, False
        yield block + "attn_v", (keys, hidden), hidden**-0.5, False
        if shape.query_key_norm:
            head = shape.query_key_norm == "head"
            yield block + "attn_q_norm", (shape.head_dim if head else queries,), None, True
            yield block + "attn_k_norm", (shape.head_dim if head else keys,), None, True
        yield block + "attn_output", (hidden, queries), 0.2 * queries**-0.5, False
        yield block + "ffn_norm", (hidden,), None, True
        yield block + "ffn_gate_inp", (experts, hidden), hidden**-0.5, True
        yield block + "ffn_gate_exps", (experts, width, hidden), hidden**-0.5, False
        yield block + "ffn_up_exps", (experts, width, hidden), hidden**-0.5, False
        yield block + "ffn_down_exps", (experts, hidden, width), width**-0.5, False
    yield "output_norm", (hidden,), None, True
    yield "output", (shape.vocab, hidden), hidden**-0.5, False


def _add_metadata(writer, shape):
    writer.add_name(f"random weights, {shape.name}")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.width)
    writer.add_expert_feed_forward_length(shape.width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocab)
    # A dummy vocabulary: control tokens, the 256 bytes, then words that no text holds.
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"\u2581w{i}" for i in range(shape.vocab - len(special) - len(bytes_))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + bytes_ + words)
    writer.add_token_scores([0.0] * 259 + [-float(i + 1) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write(shape, kind, path, seed=0):
    """Writes the file, whole or not at all."""
    path = pathlib.Path(path)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, shape.gguf_architecture)
    _add_metadata(writer, shape)
    plan = []
    for name, dims, deviation, exact in _tensors(shape):
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        form = "F32" if exact else _format(kind, name.split(".")[-1], layer, shape)
        *outer, columns = dims
        elements, size = random_blocks.BLOCK[form]
        row_bytes = columns // elements * size
        rows = int(np.prod(outer, dtype=np.int64)) if outer else 1
        raw = gguf.GGMLQuantizationType[form]
        if form == "F32":
            writer.add_tensor_info(name + ".weight", dims, np.dtype(np.float32), rows * row_bytes)
        else:
            stored = (*outer, row_bytes)
            writer.add_tensor_info(name + ".weight", stored, np.dtype(np.uint8), rows * row_bytes, raw_dtype=raw)
        plan.append((dims, form, rows, columns, deviation))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.Generator(np.random.SFC64(seed))
    for dims, form, rows, columns, deviation in plan:
        if deviation is None:
            writer.write_tensor_data(np.ones(dims, np.float32))
        else:
            writer.write_tensor_data(random_blocks.draw(random, form, rows, columns, deviation))
    writer.close()
    unfinished.rename(path)
