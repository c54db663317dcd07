"""Random weights made directly as blocks of a quantised format.

Quantising gigabytes of normal numbers in Python takes minutes, and llama.cpp's speed does not look at the numbers. So
codes are drawn from tables: a uniform byte looks up a code that is normal in distribution and symmetric around the
format's zero, and the blocks' scales give the deviation wanted. Symmetry matters: weights with a common offset send
every token to the same experts.
"""

import statistics

import numpy as np

BLOCK = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "F32": (1, 4)}


def _table(largest, deviation, offset):
    """256 codes, as a uniform byte meets them: normal around `offset`, at most `largest` away, symmetric."""
    normal = statistics.NormalDist(0.0, deviation)
    upper = [min(largest, round(normal.inv_cdf((i + 0.5) / 256))) for i in range(128, 256)]
    centred = np.array([-code for code in reversed(upper)] + upper)
    return (centred + offset).astype(np.int16), float(np.sqrt(np.mean(centred.astype(float) ** 2)))


_Q4, _Q4_DEVIATION = _table(7, 2.8, 8)
_Q4_NIBBLES = (_Q4.astype(np.uint8)[None, :] | _Q4.astype(np.uint8)[:, None] << 4).ravel()
_Q6, _Q6_DEVIATION = _table(31, 11.0, 32)
_Q8, _Q8_DEVIATION = _table(127, 42.0, 0)
# Q4_K's codes run from 0 to 15 and Q5_K's to 31; with a minimum of half the largest they are symmetric.
_K4, _ = _table(7, 2.8, 7)
_K4 = np.where(np.arange(256) >= 128, _K4 + 1, _K4)
_K5, _ = _table(15, 5.6, 15)
_K5 = np.where(np.arange(256) >= 128, _K5 + 1, _K5)
_K5_DEVIATION = float(np.sqrt(np.mean((_K5 - 15.5) ** 2)))
_K4_DEVIATION = float(np.sqrt(np.mean((_K4 - 7.5) ** 2)))
_K4_NIBBLES = (_K4.astype(np.uint8)[None, :] | _K4.astype(np.uint8)[:, None] << 4).ravel()


def _bytes(random, count):
    return np.frombuffer(random.bytes(count), np.uint8)


def _nibbles(random, table, blocks, count):
    pairs = np.frombuffer(random.bytes(2 * blocks * count), np.uint16)
    return table[pairs].reshape(blocks, count)


def _scales(random, blocks, mean):
    """Scales within 20 % of each other, as f16 in bytes."""
    spread = random.uniform(0.9, 1.1, blocks)
    return (spread * mean).astype(np.float16).view(np.uint8).reshape(blocks, 2)


def _q4_0(random, blocks, deviation):
    codes = _nibbles(random, _Q4_NIBBLES, blocks, 16)
    return np.concatenate([_scales(random, blocks, deviation / _Q4_DEVIATION), codes], axis=1)


def _q8_0(random, blocks, deviation):
    codes = _Q8.astype(np.int8).view(np.uint8)[_bytes(random, blocks * 32)].reshape(blocks, 32)
    return np.concatenate([_scales(random, blocks, deviation / _Q8_DEVIATION), codes], axis=1)


def _steps(random, blocks, scale, zero):
    """What stands before the codes of Q4_K and Q5_K. A minimum of `zero` times the scale centres the codes."""
    # Eight sub-blocks with 6-bit scales and minima; equal numbers for both centre them, with the f16 minimum `zero` times
    # the f16 scale.
    steps = random.integers(40, 64, (blocks, 8), dtype=np.uint8)
    low, high = steps[:, :4], steps[:, 4:]
    # Bytes 0-3: scales 0-3 and the upper bits of 4-7; bytes 4-7 the same of the minima; bytes 8-11 the lower bits.
    first = low | high >> 4 << 6
    packed = np.concatenate([first, first, high & 15 | (high & 15) << 4], axis=1)
    root_mean_square = float(np.sqrt(np.mean(np.arange(40, 64) ** 2)))
    scale = np.full(blocks, scale / root_mean_square).astype(np.float16)
    halves = np.stack([scale, (scale.astype(np.float32) * zero).astype(np.float16)], axis=1).view(np.uint8)
    return np.concatenate([halves, packed], axis=1)


def _q4_k(random, blocks, deviation):
    head = _steps(random, blocks, deviation / _K4_DEVIATION, 7.5)
    return np.concatenate([head, _nibbles(random, _K4_NIBBLES, blocks, 128)], axis=1)


def _q5_k(random, blocks, deviation):
    codes = _K5.astype(np.uint8)[_bytes(random, blocks * 256)].reshape(blocks, 4, 2, 32)
    # The fifth bits of eight sub-blocks in 32 bytes; then 32 bytes of nibbles for each pair of sub-blocks.
    fifth = np.bitwise_or.reduce([codes[:, i // 2, i % 2] >> 4 << i for i in range(8)])
    nibbles = (codes[:, :, 0] & 15 | (codes[:, :, 1] & 15) << 4).reshape(blocks, 128)
    return np.concatenate([_steps(random, blocks, deviation / _K5_DEVIATION, 15.5), fifth, nibbles], axis=1)


def _q6_k(random, blocks, deviation):
    codes = _Q6.astype(np.uint8)[_bytes(random, blocks * 256)].reshape(blocks, 2, 4, 32)
    # A half block holds four runs of 32 codes: lower nibbles in 64 bytes, the two upper bits of all four in 32.
    low, high = codes & 15, codes >> 4
    nibbles = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    upper = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    steps = random.integers(90, 128, (blocks, 16), dtype=np.uint8)
    root_mean_square = float(np.sqrt(np.mean(np.arange(90, 128) ** 2)))
    scale = np.full(blocks, deviation / (_Q6_DEVIATION * root_mean_square)).astype(np.float16)
    parts = [nibbles.reshape(blocks, 128), upper.reshape(blocks, 64), steps, scale.view(np.uint8).reshape(blocks, 2)]
    return np.concatenate(parts, axis=1)


_MAKERS = {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


def draw(random, kind, rows, columns, deviation):
    """`[rows, bytes of a row]` of a format, or f32 `[rows, columns]`: zero mean, the deviation given."""
    if kind == "F32":
        return random.standard_normal((rows, columns), np.float32) * np.float32(deviation)
    elements, size = BLOCK[kind]
    if columns % elements:
        raise SystemExit(f"{kind}: rows of {columns} are no whole blocks of {elements}")
    blocks = columns // elements
    out = np.empty((rows, blocks * size), np.uint8)
    step = max(1, (1 << 23) // columns)
    for first in range(0, rows, step):
        part = out[first : first + step]
        part[:] = _MAKERS[kind](random, len(part) * blocks, deviation).reshape(part.shape)
    return out
