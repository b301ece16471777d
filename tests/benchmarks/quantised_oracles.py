r"""Our reading of quantised weights, bit by bit, against the packages that write them; they are no part of the suite.

pip install --target oracles --no-deps bitsandbytes compressed-tensors loguru auto-round py-cpuinfo \
    gptqmodel pypcre device-smi tokenicer logbar defuser torchao \
    nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 pulp
pip download --no-deps --no-binary :all: autoawq  # for GPUs alone: put its folder `awq` into oracles
PYTHONPATH=.:oracles python -m tests.benchmarks.quantised_oracles
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
        (Path(place) / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": quantisation}))
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


def _affine(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros that a quantiser would choose, (out, groups): numbers from 0 on, no zero among the zeros."""
    groups, top = weight.unflatten(1, (-1, group)), 2**bits - 1
    low = groups.amin(dim=2).clamp(max=0)
    scales = ((groups.amax(dim=2).clamp(min=0) - low) / top).half().float()
    return scales, (-low / scales).round().clamp(1, top)


def gptq() -> None:
    """GPTQModel packs and dequantises: each number of bits, both versions, inputs in any order."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for bits in (2, 3, 4, 8):
        for act_order in (False, True):
            for version in (2, 1):
                linear = torch.nn.Linear(96, 64, bias=False)
                scales, zeros = _affine(linear.weight.detach(), bits, 32)
                order = torch.randperm(96) if act_order else torch.arange(96)
                layer = TorchLinear(
                    bits=bits, group_size=32, sym=False, desc_act=act_order, in_features=96, out_features=64
                )
                layer.pack(linear, scales.clone(), zeros.clone(), (order // 32).to(torch.int32))
                layer.eval()
                theirs = layer.dequantize_weight().T.contiguous()
                if version == 1:
                    convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits))
                parts = {name: getattr(layer, name).detach() for name in ("qweight", "qzeros", "scales", "g_idx")}
                settings = {"bits": bits, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
                what = f"gptq, {bits} bits, version {version}, {'any' if act_order else 'own'} order"
                tell(what, ours(parts, quant_method="gptq", group_size=32, **settings), theirs)


def awq() -> None:
    """AutoAWQ packs and dequantises."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    _of_awq("awq", WQLinear_GEMM, dequantize_gemm, {"quant_method": "awq", "version": "gemm"})


def _of_awq(what: str, kind: Any, dequantise: Any, config: dict[str, Any]) -> None:
    linear = torch.nn.Linear(96, 64, bias=False).half()
    scales, zeros = _affine(linear.weight.detach().float(), 4, 32)
    layer = kind.from_linear(linear, 4, 32, scales=scales.T.contiguous().half(), zeros=zeros.T.contiguous())
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    theirs = dequantise(layer.qweight, layer.qzeros, layer.scales, 4, 32).T.contiguous()
    tell(f"{what}, 4 bits", ours(parts, group_size=32, **config), theirs)


def auto_round() -> None:
    """AutoRound's three packings; a product with the unit matrix shows its weights."""
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    kinds = {
        "auto_round": qlinear_torch,
        "auto_round:auto_gptq": qlinear_torch_zp,
        "auto_round:gptqmodel": qlinear_torch,
    }
    for packing, module in kinds.items():
        for bits in (2, 3, 4, 8):
            linear = torch.nn.Linear(96, 64, bias=False)
            scales, zeros = _affine(linear.weight.detach(), bits, 32)
            layer = module.QuantLinear(bits, 32, 96, 64, False, g_idx="gptqmodel" in packing)
            layer.device = "cpu"
            layer.pack(linear, scales, zeros)
            with torch.no_grad():
                theirs = layer(torch.eye(96, dtype=torch.float16)).T.contiguous()
            parts = dict(layer.state_dict())
            config = {"quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": 32}
            tell(f"{packing}, {bits} bits", ours(parts, **config), theirs)
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    _of_awq("auto_round:auto_awq", WQLinear_GEMM, dequantize_gemm, config)


def modelopt() -> None:
    """ModelOpt exports; what it computes while it calibrates is the weight that the export stands for."""
    import modelopt.torch.quantization as quantisation
    from modelopt.torch.export import quant_utils as export
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    presets = {
        "FP8": quantisation.FP8_DEFAULT_CFG,
        "FP8_PER_CHANNEL_PER_TOKEN": quantisation.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "FP8_PB_WO": quantisation.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        "W8A8_SQ_PER_CHANNEL": quantisation.INT8_DEFAULT_CFG,
    }
    for algorithm, preset in presets.items():
        model = torch.nn.Sequential(torch.nn.Linear(256, 384, bias=False))
        inputs = torch.randn(16, 256)
        quantisation.quantize(model, preset, lambda model: model(inputs))  # noqa: B023
        layer: Any = model[0]
        scale, kind = export.get_weight_scaling_factor(layer), export.get_quantization_format(layer)
        stored = export.to_quantized_weight(
            layer.weight.detach(), scale, kind, block_size=export.get_weight_block_size(layer)
        )
        theirs = layer.weight_quantizer(layer.weight).detach().bfloat16()  # in fp32 it divides in another order
        parts = {"weight": stored, "weight_scale": scale}
        tell(f"modelopt {algorithm}", ours(parts, quant_method="modelopt", quant_algo=algorithm), theirs)
    weight = torch.randn(96, 128)
    made, scale, whole = NVFP4QTensor.quantize(weight, 16)
    theirs = made.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    parts = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
    tell("modelopt NVFP4", ours(parts, quant_method="modelopt", quant_algo="NVFP4"), theirs)
    made, scale = MXFP8QTensor.quantize(weight)
    theirs = made.dequantize(torch.float32, scale=scale)
    parts = {"weight": made._quantized_data, "weight_scale": scale}
    tell("modelopt MXFP8", ours(parts, quant_method="modelopt", quant_algo="MXFP8"), theirs)
    made, scale = MXFP4QTensor.quantize(weight, 32)
    theirs = made.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    parts = {"weight": made._quantized_data, "weight_scale": scale.reshape(96, 4)}
    tell("modelopt MXFP4", ours(parts, quant_method="modelopt", quant_algo="W4A8_MXFP4_FP8"), theirs)


if __name__ == "__main__":
    torch.manual_seed(0)
    bitsandbytes()
    compressed_tensors()
    gptq()
    awq()
    auto_round()
    modelopt()
