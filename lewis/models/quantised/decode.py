"""Decode quantised weights: numbers of 8 or 4 bits with scales, and those packed into 32-bit words (GPTQ, AWQ)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lewis.models.quantised.stored import E2M1, Stored, nibbles, powers_of_two

_AT_A_TIME = 1 << 18  # elements that are scaled at a time
_BY_127 = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring outputs each four bits of a word hold
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in each number of a word


def _times_scales(values: np.ndarray, scales: np.ndarray, block: Sequence[int] | None = None) -> np.ndarray:
    """Multiply a weight by its scales, in place; each scale holds for a block of rows and columns.

    Args:
        values: fp32, shape (..., rows, columns).
        scales: fp32: one number; for a matrix, one for each row, shape (rows,); or a grid, shape (..., grid rows, grid
            columns).
        block: rows and columns of a block, of which the last may be cut off; by default, or where the grid has another
            number of blocks, the rows and columns are divided evenly.

    Raises:
        ValueError: if the grid does not divide the weight, or one number for each row is given for stacked experts.
    """
    if scales.size == 1:
        values *= scales.reshape(())
        return values
    if scales.ndim == 1:
        if values.ndim != 2:
            raise ValueError(f"scales of shape {list(scales.shape)} do not fit a weight of {list(values.shape)}")
        scales = scales[:, None]
    shape, grid = values.shape[-2:], scales.shape[-2:]
    if block is None or any(-(-size // step) != n for size, step, n in zip(shape, block, grid, strict=True)):
        if any(size % n for size, n in zip(shape, grid, strict=True)):
            raise ValueError(f"scales of shape {list(scales.shape)} do not divide a weight of {list(values.shape)}")
        block = [size // n for size, n in zip(shape, grid, strict=True)]
    grid_row, (rows, columns) = np.arange(shape[0]) // block[0], shape
    scales = np.broadcast_to(scales, (*values.shape[:-2], *grid)).reshape(-1, *grid)
    step = max(_AT_A_TIME // max(columns, 1), 1)
    for matrix, own in zip(values.reshape(-1, rows, columns), scales, strict=True):
        for start in range(0, rows, step):
            factors = own[grid_row[start : start + step]]
            if grid[1] > 1:
                factors = np.repeat(factors, block[1], axis=1)[:, :columns]
            matrix[start : start + step] *= factors
    return values


def decode_scaled(parts: Mapping[str, Stored], block: Sequence[int] | None, grid: tuple[int, ...]) -> np.ndarray:
    """Compute `(weight - zero) * scale` in fp32: fp8 in any layout, or int8 with a scale for each row.

    Args:
        parts: `weight`, `scale`, and for asymmetric int8 `zero`.
        block: as for `_times_scales`.
        grid: shape of the scales.
    """
    values, factors = parts["weight"].floats(), _factors(parts["scale"]).reshape(grid)
    if "zero" in parts:
        zero = parts["zero"].floats()
        if zero.size == values.shape[0]:
            zero = zero.reshape(-1, 1)
        values -= zero if 1 in zero.shape else np.repeat(zero, values.shape[1] // zero.shape[1], axis=1)
    return _times_scales(values, factors, block)


def decode_fp4(parts: Mapping[str, Stored], divided: bool) -> np.ndarray:
    """Decode and scale two fp4 numbers (E2M1) in each byte, the lower four bits first, along the columns.

    Args:
        parts: `weight`, shape (..., rows, columns / 2); `scale`, a grid; `global`, one more factor for all, if stored.
        divided: whether the scales are divided by `global`, as compressed-tensors' are; else multiplied.
    """
    weight, factors = parts["weight"], _factors(parts["scale"])
    if "global" in parts:
        more = parts["global"].floats().reshape(())
        factors = factors / more if divided else factors * more
    values = nibbles(weight.bytes(), E2M1).reshape(*weight.shape[:-1], 2 * weight.shape[-1])
    return _times_scales(values, factors)


def _factors(scale: Stored) -> np.ndarray:
    """Return scales in fp32, in their shape; they are stored as numbers, or as exponents of two."""
    return powers_of_two(scale) if scale.dtype in ("U8", "F8_E8M0") else scale.floats()


def decode_mxfp4(parts: Mapping[str, Stored]) -> np.ndarray:
    """Decode experts of gpt-oss: blocks of 32 numbers along the inputs, one power of two for each; stored (out, in).

    Args:
        parts: `blocks`, uint8 of shape (experts, out, in / 32, 16); `scales`, uint8 of shape (experts, out, in / 32).

    Returns:
        fp32 of shape (experts, in, out), as the model holds them.
    """
    blocks, scales = parts["blocks"], powers_of_two(parts["scales"])
    experts, outputs, groups, half = blocks.shape
    found = np.empty((experts, groups * half * 2, outputs), np.float32)
    codes = blocks.bytes().reshape(experts, outputs, groups, half)
    for expert in range(experts):
        values = nibbles(codes[expert].reshape(-1), E2M1).reshape(outputs, groups, 2 * half)
        values *= scales[expert][:, :, None]
        found[expert] = values.reshape(outputs, -1).T
    return found


def decode_bnb8(parts: Mapping[str, Stored]) -> np.ndarray:
    """Decode LLM.int8 of bitsandbytes: int8, and for each row its largest magnitude, which 127 stands for."""
    values = parts["weight"].floats()
    values *= parts["SCB"].floats()[:, None]
    values *= np.float32(_BY_127)
    return values


def decode_bnb4(parts: Mapping[str, Stored], state: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Decode bitsandbytes' NF4 or FP4 (arXiv 2305.14314): a table of 16 numbers, and a scale for each block of numbers.

    With double quantisation the scales are bytes themselves: a table of 256 numbers, a scale for each block of them,
    and an offset.

    Args:
        parts: `weight`; `absmax`, `quant_map`; with double quantisation `nested_absmax` and `nested_quant_map`.
        state: the quantisation state in the checkpoint: `blocksize`, `nested_blocksize`, `nested_offset`.
        shape: of the weight.
    """
    scales = parts["absmax"]
    if "nested_absmax" in parts:
        factors = _times_blocks(
            parts["nested_quant_map"].floats()[scales.bytes()],
            parts["nested_absmax"].floats(),
            int(state["nested_blocksize"]),
        )
        factors += np.float32(state["nested_offset"])
    else:
        factors = scales.floats().reshape(-1)
    values = nibbles(parts["weight"].bytes(), parts["quant_map"].floats(), high_first=True)[: math.prod(shape)]
    return _times_blocks(values, factors, int(state["blocksize"])).reshape(shape)


def _times_blocks(values: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    """Multiply each run of `size` numbers by its scale, in place; the last run may be shorter."""
    whole = values.size // size
    values[: whole * size].reshape(whole, size)[:] *= scales[:whole, None]
    if values.size > whole * size:
        values[whole * size :] *= scales[whole]
    return values


def _unpacked(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Unpack the numbers of words, which lie one after another along the first axis, lowest bits first.

    Args:
        words: uint32, shape (words, columns).
        bits: of a number; it may lie in two words.
        order: where in its word each number belongs; by default in the order in which they lie.

    Yields:
        Places along the first axis, and their numbers: uint32, shape (places, columns).
    """
    shared = math.gcd(bits, 32)
    in_run, run = 32 // shared, bits // shared  # `in_run` numbers fill `run` words
    for i in range(in_run):
        word, shift = divmod(i * bits, 32)
        found = words[word::run] >> np.uint32(shift)
        if shift + bits > 32:
            found |= words[word + 1 :: run] << np.uint32(32 - shift)
        found &= np.uint32((1 << bits) - 1)
        yield slice(order[i] if order else i, None, in_run), found


def _unpack(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Return all numbers of `_unpacked` in one array, fp32."""
    found = np.empty((words.shape[0] * 32 // bits, words.shape[1]), np.float32)
    for places, numbers in _unpacked(words, bits, order):
        found[places] = numbers
    return found


def decode_gptq(parts: Mapping[str, Stored], bits: int, group: int, plus_one: bool) -> np.ndarray:
    """Decode GPTQ (arXiv 2210.17323) of AutoGPTQ and GPTQModel: `scale * (number - zero)`, inputs along the words.

    Args:
        parts: `qweight`, int32 of shape (in * bits / 32, out); `qzeros`, int32 of shape (groups, out * bits / 32);
            `scales`, shape (groups, out); `g_idx`, the group of each input, if it is stored.
        bits: of a number.
        group: inputs of a group; -1: one group.
        plus_one: whether each zero is stored as one less, as the first version of the format does.

    Returns:
        fp32 of shape (out, in).
    """
    words, scales = parts["qweight"].words(), parts["scales"].floats()
    packed_zeros = parts["qzeros"].words()
    if plus_one and bits in _ONES:
        packed_zeros = packed_zeros + np.uint32(_ONES[bits])  # GPTQModel adds to the whole word likewise
    zeros = np.ascontiguousarray(_unpack(packed_zeros.T, bits).T)
    if plus_one and bits not in _ONES:
        zeros = (zeros + 1) % (1 << bits)
    inputs = words.shape[0] * 32 // bits
    groups = parts["g_idx"].whole() if "g_idx" in parts else np.arange(inputs) // (group if group > 0 else inputs)
    return _by_inputs(words, bits, scales, zeros[:, : scales.shape[1]], groups)


def decode_pack_quantized(parts: Mapping[str, Stored], bits: int, group: int, shape: tuple[int, int]) -> np.ndarray:
    """Decode compressed-tensors' pack-quantized format: `scale * (number - zero)`, inputs along the words.

    Args:
        parts: `packed`, int32 of shape (out, words); `scale`, shape (out, groups); for asymmetric ones `zero`, int32 of
            shape (words, groups), outputs along the words; `g_idx`, the group of each input, if it is stored.
        bits: of a number, which is stored with half of its range added.
        group: inputs of a group, of which the last may be shorter; 0: one group.
        shape: of the weight.
    """
    outputs, inputs = shape
    scales = np.ascontiguousarray(parts["scale"].floats().reshape(outputs, -1).T)
    middle = np.float32(1 << (bits - 1))
    zeros = np.broadcast_to(middle, scales.shape)
    if "zero" in parts:
        zeros = _unpack(parts["zero"].words(), bits)[:outputs].T
    order = parts["g_idx"].whole() if "g_idx" in parts else np.arange(inputs) // (group or inputs)
    return _by_inputs(np.ascontiguousarray(parts["packed"].words().T), bits, scales, zeros, order)


def decode_awq(parts: Mapping[str, Stored]) -> np.ndarray:
    """Decode AWQ (arXiv 2306.00978) of AutoAWQ's GEMM: 4 bits, outputs along the words, `scale * (number - zero)`.

    Args:
        parts: `qweight`, int32 of shape (in, out / 8); `qzeros`, int32 of shape (groups, out / 8); `scales`, shape
            (groups, out).

    Returns:
        fp32 of shape (out, in).
    """
    words, scales = parts["qweight"].words().T, parts["scales"].floats()
    inputs, (groups, outputs) = words.shape[1], scales.shape
    zeros = _unpack(parts["qzeros"].words().T, 4, _AWQ_ORDER)
    of_input, found = np.arange(inputs) // (inputs // groups), np.empty((outputs, inputs), np.float32)
    for places, numbers in _unpacked(words, 4, _AWQ_ORDER):
        values = numbers.astype(np.float32)
        values -= zeros[places][:, of_input]
        values *= scales.T[places][:, of_input]
        found[places] = values
    return found


def _by_inputs(words: np.ndarray, bits: int, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Compute `scale * (number - zero)` from words along the inputs, fp32 of shape (out, in).

    Args:
        words: uint32, shape (words, out).
        bits: of a number.
        scales, zeros: fp32, shape (groups, out).
        groups: of each input; as many as there are inputs, which may leave the last word unfilled.
    """
    inputs = len(groups)
    found = np.empty((words.shape[1], inputs), np.float32)
    for places, numbers in _unpacked(words, bits):
        of = groups[places]
        values = numbers[: len(of)].astype(np.float32)
        values -= zeros[of]
        values *= scales[of]
        found[:, places] = values.T
    return found
