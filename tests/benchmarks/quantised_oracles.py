"""Our reading of quantised weights, bit by bit, against the packages that write them; they are no part of the suite.

pip install --target oracles --no-deps bitsandbytes compressed-tensors loguru
PYTHONPATH=.packages:.:oracles python -m tests.benchmarks.quantised_oracles
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lewis.models.checkpoint import Checkpoint


def ours(parts: dict[str, torch.Tensor], **quantisation: Any) -> torch.Tensor:
    """The weight `a.weight` of a checkpoint with these parts."""
    with tempfile.TemporaryDirectory() as place:
        save_file(
            {f"a.{name}": part.contiguous().clone() for name, part in parts.items()}, f"{place}/model.safetensors"
        )
        (Path(place) / "config.json").write_text(json.dumps({"quantization_config": quantisation}))
        return Checkpoint(Path(place), "key").read("a.weight")


def tell(what: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Print whether two weights are equal in the dtype of the second."""
    print(f"{'equal' if torch.equal(mine.to(theirs.dtype), theirs) else 'DIFFER':<7} {what}, {theirs.dtype}")


def bitsandbytes() -> None:
    """NF4 and FP4, with and without double quantisation, in bytes and in BF16; LLM.int8."""
    import bitsandbytes.functional as functional

    config = {"quant_method": "bitsandbytes"}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for storage in (torch.uint8, torch.bfloat16):
                # 128 columns: with 80, which blocks of 64 do not divide, its own CPU kernel gives other rows back.
                options = {"compress_statistics": nested, "quant_type": kind, "quant_storage": storage}
                stored, state = functional.quantize_4bit(torch.randn(96, 128).half(), blocksize=64, **options)
                parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
                mine = ours({"weight": stored, **parts}, **config)
                tell(f"{kind}, nested {nested}, {storage}", mine, functional.dequantize_4bit(stored, state))
    stored, largest, _ = functional.int8_vectorwise_quant(torch.randn(96, 128).half())
    mine = ours({"weight": stored, "SCB": largest}, **config)
    tell("int8", mine, functional.int8_vectorwise_dequant(stored, largest))


def compressed_tensors() -> None:
    """Whole numbers in words and bytes, fp8 by rows, tensors and blocks, NVFP4 and MXFP4."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight, square = torch.randn(64, 96), torch.randn(256, 256)
    rows, groups = weight.abs().amax(dim=1, keepdim=True), weight.reshape(64, -1, 32)
    low, wide = groups.amin(dim=2), (groups.amax(dim=2) - groups.amin(dim=2)) / 15
    total = 448 * 6 / weight.abs().max()
    of_16 = weight.reshape(64, -1, 16).abs().amax(dim=2)
    cases: list[tuple[str, dict[str, Any], torch.Tensor, dict[str, torch.Tensor]]] = [
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, weight, {"scale": rows / 127}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, weight[:, :90], {"scale": rows / 7}),
        (
            "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, weight,
            {"scale": wide, "zero_point": (-8 - low / wide).round().clamp(-8, 7).to(torch.int8)},
        ),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, weight, {"scale": rows / 127}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, weight, {"scale": rows / 448}),
        (
            "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, weight,
            {"scale": (weight.abs().max() / 448).reshape(1)},
        ),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}, square,
            {"scale": square.reshape(2, 128, 2, 128).abs().amax(dim=(1, 3)) / 448},
        ),
        (
            "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            weight, {"scale": (of_16 / 6 * total).to(torch.float8_e4m3fn).float(), "global_scale": total.reshape(1)},
        ),
        (
            "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, weight,
            {"scale": groups.abs().amax(dim=2).log2().floor().exp2() / 4},
        ),
    ]  # fmt: skip
    for format, weights, given, more in cases:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=format)
        compressor = BaseCompressor.get_value_from_registry(format)
        state = {"weight": given, **{f"weight_{name}": value for name, value in more.items()}}
        parts = compressor.compress(state, scheme)
        theirs = compressor.decompress(dict(parts), scheme)["weight"]
        config = {"format": format, "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
        tell(f"{format} {weights}", ours(parts, quant_method="compressed-tensors", **config), theirs)


if __name__ == "__main__":
    torch.manual_seed(0)
    bitsandbytes()
    compressed_tensors()
