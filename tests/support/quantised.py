"""Tiny quantised checkpoints, packed number by number as each format is published, and what they stand for.

Nothing here shares code with what reads them: numbers are put into words one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Pack = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""A weight (out, in) -> what is stored, by what follows the module's name, and the weight that it stands for."""

GROUP = 8  # inputs
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@dataclass(frozen=True)
class Format:
    """One way to quantise: what config.json says, and how a weight is packed."""

    config: dict[str, Any]
    pack: Pack


def into_words(numbers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack each row of whole numbers into int32 words, lowest bits first; `order`: which number is at which place."""
    rows = []
    for row in numbers.tolist():
        if order:
            row = [row[start + place] for start in range(0, len(row), len(order)) for place in order]
        whole = sum(int(number) << (bits * i) for i, number in enumerate(row))
        words = [whole >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def nibbles(codes: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Two codes of 4 bits to the byte, along the last dimension."""
    pairs = codes.to(torch.uint8).reshape(*codes.shape[:-1], -1, 2)
    low, high = (pairs[..., 1], pairs[..., 0]) if high_first else (pairs[..., 0], pairs[..., 1])
    return low | high << 4


def nearest(values: torch.Tensor, table: list[float]) -> torch.Tensor:
    """The code of the nearest number of a table."""
    return (values[..., None] - torch.tensor(table)).abs().argmin(dim=-1)


def _repeated(scale: torch.Tensor, shape: torch.Size, block: int) -> torch.Tensor:
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


def fp8_blocks(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """DeepSeek: blocks of 8 x 8, the inverse scale in fp32."""
    rows, columns = (-(-size // 8) for size in weight.shape)
    padded = torch.zeros(8 * rows, 8 * columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.reshape(rows, 8, columns, 8).abs().amax(dim=(1, 3)) / 448
    stored = (weight / _repeated(scale, weight.shape, 8)).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * _repeated(scale, weight.shape, 8)


def fp8_tensor(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale for the tensor, and one for its inputs."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": stored, "weight_scale_inv": scale, "activation_scale": torch.ones(())}
    return parts, stored.float() * scale


def fp8_channels(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors: a scale for each row, in bfloat16."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
    stored = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.ones(1)}, stored.float() * scale.float()


def int8_channels(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors, asymmetric: a scale and a zero for each row."""
    scale = (weight.amax(dim=1, keepdim=True) - weight.amin(dim=1, keepdim=True)) / 255
    zero = (-128 - weight.amin(dim=1, keepdim=True) / scale).round().clamp(-128, 127)
    stored = (weight / scale + zero).round().clamp(-128, 127)
    parts = {"weight": stored.to(torch.int8), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    return parts, (stored - zero) * scale


def fp4_blocks(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors NVFP4: 16 numbers share a scale in fp8, which is divided by one for the tensor."""
    groups = weight.reshape(weight.shape[0], -1, 16)
    total = 448 * 6 / weight.abs().max()
    scale = (groups.abs().amax(dim=2) / 6 * total).to(torch.float8_e4m3fn)
    factor = (scale.float() / total)[:, :, None]
    codes = nearest(groups / factor, E2M1)
    parts = {
        "weight_packed": nibbles(codes.reshape(weight.shape)),
        "weight_scale": scale,
        "weight_global_scale": total.reshape(1),
    }
    return parts, (torch.tensor(E2M1)[codes] * factor).reshape(weight.shape)


def bnb8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """bitsandbytes LLM.int8: the largest magnitude of each row."""
    largest = weight.abs().amax(dim=1)
    stored = (weight * 127 / largest[:, None]).round().to(torch.int8)
    parts = {"weight": stored, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return parts, stored.float() * largest[:, None] * 7.874015718698502e-3


def bnb4(kind: str, nested: bool) -> Pack:
    """bitsandbytes: blocks of 64 numbers; with double quantisation, blocks of 2 scales."""
    table = NF4 if kind == "nf4" else [value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    table = table if kind == "nf4" else [*table, *(-value for value in table)]

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        flat = weight.reshape(-1)
        blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
        scales = torch.stack([block.abs().max() for block in blocks])
        state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
        parts = {"weight.quant_map": torch.tensor(table)}
        if nested:
            offset, codes = scales.mean(), [i / 127 - 1 for i in range(255)] + [1.0]
            rest = scales - offset
            outer = torch.stack([part.abs().max().clamp(min=1e-6) for part in rest.split(2)])
            number = nearest(rest / outer.repeat_interleave(2)[: len(rest)], codes)
            scales = torch.tensor(codes)[number] * outer.repeat_interleave(2)[: len(rest)] + offset
            state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": float(offset)}
            parts |= {"weight.absmax": number.to(torch.uint8), "weight.nested_absmax": outer}
            parts |= {"weight.nested_quant_map": torch.tensor(codes)}
        else:
            parts["weight.absmax"] = scales
        found = [nearest(block / scale, table) for block, scale in zip(blocks, scales, strict=True)]
        values = [torch.tensor(table)[codes] * scale for codes, scale in zip(found, scales, strict=True)]
        parts["weight"] = nibbles(torch.cat(found), high_first=True).reshape(-1, 1)
        told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = told
        return parts, torch.cat(values).reshape(weight.shape)

    return pack


def _affine(weight: torch.Tensor, bits: int, group_of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Numbers (out, in), scales and zeros (out, groups), and `scale * (number - zero)`; scales are those of fp16."""
    top, groups = (1 << bits) - 1, int(group_of.max()) + 1
    scales, zeros = torch.empty(weight.shape[0], groups), torch.empty(weight.shape[0], groups)
    for g in range(groups):
        own = weight[:, group_of == g]
        low, high = own.amin(dim=1).clamp(max=0), own.amax(dim=1).clamp(min=0)
        scales[:, g] = ((high - low) / top).half().float()
        zeros[:, g] = (-low / scales[:, g]).round().clamp(1, top)
    numbers = (weight / scales[:, group_of] + zeros[:, group_of]).round().clamp(0, top)
    return numbers, scales, zeros, (numbers - zeros[:, group_of]) * scales[:, group_of]


def gptq(bits: int = 4, *, act_order: bool = False, version: int = 1) -> Pack:
    """AutoGPTQ and GPTQModel: inputs along the words; version 1 stores each zero as one less."""

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        group_of = torch.arange(weight.shape[1]) // GROUP
        if act_order:
            group_of = group_of[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))]
        numbers, scales, zeros, values = _affine(weight, bits, group_of)
        parts = {
            "qweight": into_words(numbers, bits).T,
            "qzeros": into_words((zeros - int(version == 1)).T, bits),
            "scales": scales.T.half(),
            "g_idx": group_of.to(torch.int32),
        }
        return parts if act_order else {k: v for k, v in parts.items() if k != "g_idx"}, values

    return pack


def awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """AutoAWQ's GEMM: outputs along the words, in an order of its own."""
    numbers, scales, zeros, values = _affine(weight, 4, torch.arange(weight.shape[1]) // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": into_words(numbers.T, 4, order), "qzeros": into_words(zeros.T, 4, order)}
    return {**parts, "scales": scales.T.half()}, values


def packed(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors pack-quantized, asymmetric: inputs along the words, zeros along the outputs."""
    numbers, scales, zeros, values = _affine(weight, 4, torch.arange(weight.shape[1]) // GROUP)
    parts = {
        "weight_packed": into_words(numbers, 4),
        "weight_scale": scales,
        "weight_zero_point": into_words(zeros.T, 4).T,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, values


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


_BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FORMATS = {
    "fp8 blocks": Format({"quant_method": "fp8", "weight_block_size": [8, 8]}, fp8_blocks),
    "fp8 tensor": Format({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "fp8 channels": Format(_compressed("float-quantized", type="float", num_bits=8), fp8_channels),
    "int8 channels": Format(_compressed("int-quantized", type="int", num_bits=8), int8_channels),
    "nvfp4": Format(_compressed("nvfp4-pack-quantized", type="float", num_bits=4, group_size=16), fp4_blocks),
    "int4 packed": Format(_compressed("pack-quantized", type="int", num_bits=4, group_size=GROUP), packed),
    "bnb 8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
    "bnb nf4": Format({"load_in_4bit": True}, bnb4("nf4", nested=False)),
    "bnb nf4 double": Format(_BNB4, bnb4("nf4", nested=True)),
    "bnb fp4": Format(_BNB4, bnb4("fp4", nested=False)),
    "gptq": Format({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq()),
    "gptq in the order of activation": Format({"quant_method": "gptq", "bits": 4}, gptq(act_order=True)),
    "gptq 8 bits, version 2": Format(
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "checkpoint_format": "gptq_v2"}, gptq(8, version=2)
    ),
    "auto-round": Format(
        {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4, "group_size": GROUP}, gptq(version=2)
    ),
    "auto-round as GPTQ": Format(
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "group_size": GROUP}, gptq()
    ),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
}


def write_quantised(model: Path, folder: Path, name: str, plain: Path | None = None) -> dict[str, torch.Tensor]:
    """Quantise the projections of a single-file model.

    Args:
        model: its folder.
        folder: of the copy.
        name: of the format.
        plain: where to write a checkpoint in fp32 with the values that the copy stands for, if anywhere.

    Returns:
        Tensor -> the values that the copy stands for.
    """
    found, values = FORMATS[name], dict[str, torch.Tensor]()
    stored: Parts = {}
    for key, tensor in load_file(model / "model.safetensors").items():
        if ".layers." not in key or tensor.dim() != 2:
            stored[key] = values[key] = tensor
            continue
        parts, values[key] = found.pack(tensor.float())
        stored |= {f"{key.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
    for place, tensors, changes in ((folder, stored, {"quantization_config": found.config}), (plain, values, {})):
        if place is not None:
            place.mkdir(parents=True)
            for path in model.iterdir():
                if path.suffix in (".json", ".jinja"):
                    (place / path.name).write_bytes(path.read_bytes())
            config = json.loads((model / "config.json").read_text())
            (place / "config.json").write_text(json.dumps({**config, **changes}))
            save_file({key: value.contiguous() for key, value in tensors.items()}, place / "model.safetensors")
    return values
