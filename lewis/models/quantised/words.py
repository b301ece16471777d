"""Decode weights of 2, 3, 4 or 8 bits that are packed into 32-bit words: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd

import numpy as np

from lewis.models.quantised.stored import Stored

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring outputs each four bits of a word hold
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in each number of a word


def _unpacked(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Unpack the numbers of words, which lie one after another along the first axis, lowest bits first.

    Args:
        words: uint32, shape (words, columns).
        bits: of a number; it may lie in two words.
        order: where in its word each number belongs; by default in the order in which they lie.

    Yields:
        Places along the first axis, and their numbers: uint32, shape (places, columns).
    """
    shared = gcd(bits, 32)
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
