"""Read the quantisation method and variant from a config.json; refuse those that are not supported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis.errors import InputError
from lewis.models.dtypes import MERGED

_KEYS = ("quantization_config", "compression_config")  # the second key is that of compressed-tensors before 0.6
_READ = ("fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes", "gptq", "awq", "compressed-tensors", "auto-round", "modelopt")
_FIX = (
    "use the unquantised model; or load it with transformers, which needs that method's package, call "
    "model.dequantize() and save_pretrained()"
)
_GPTQ_FORMATS = {None, "gptq", "gptq_v2"}
_AWQ_FORMATS = {None, "gemm"}
_COMPRESSED = (
    *("pack-quantized", "float-quantized", "int-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)
_ROUNDED = {  # AutoRound's packing formats: whose layout they have, and whether zero points are stored minus one
    "auto_round": ("gptq", False),
    "auto_round:gptqmodel": ("gptq", False),
    "auto_round:auto_gptq": ("gptq", True),
    "auto_round:auto_awq": ("awq", False),
}
_MODELOPT = {None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "W8A16", "W8A8_SQ_PER_CHANNEL"}
_MODELOPT |= {"NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MIXED_PRECISION"}
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their Conv1D stores (in, out)
_IN_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")


@dataclass(frozen=True)
class Settings:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: as the config names it.
        layout: format of its 32-bit words, `gptq` or `awq`; empty if it has none.
        plus_one: whether GPTQ's zeros are stored as one less.
        group_size: inputs that share a scale; 0 if the config does not say, -1 for all.
        block: rows and columns that share a scale in fp8.
        packed: what the packed weights of compressed-tensors may have: pairs of bits, and inputs that share a scale (0:
            a whole row).
        model_type: of the config.
    """

    method: str
    layout: str = ""
    plus_one: bool = True
    group_size: int = 0
    block: tuple[int, int] | None = None
    packed: tuple[tuple[int, int], ...] = ()
    model_type: str = ""

    def stores_transposed(self, weight: str) -> bool:
        """Whether the model holds a weight as (in, out), which the quantisation stores as (out, in)."""
        return self.model_type in _CONV1D and weight.endswith(_IN_CONV1D)

    def bits_of(self, columns: int, groups: int, inputs: int | None) -> tuple[int, int, int]:
        """Return bits of a number, numbers in a row of `columns` words and `groups` scales, and numbers in a group.

        Args:
            inputs: how many numbers the row has, if that is known.

        Raises:
            ValueError: if the config has no such words.
        """
        for bits, group in self.packed:
            numbers = inputs or (groups * group if group else columns * 32 // bits)
            if -(-numbers // (32 // bits)) == columns and groups == (-(-numbers // group) if group else 1):
                return bits, numbers, group
        raise ValueError(f"no group in config_groups has {columns} words and {groups} scales to the row")


def settings_of(where: object, config: Mapping[str, Any]) -> Settings | None:
    """Read from a config how its weights are quantised; None if it names no quantisation.

    Raises:
        InputError: naming the method, if it is not supported.
    """
    given = next(_given(config), None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        given = {"quant_method": str(given)}
    method = str(given.get("quant_method") or _guessed(given))
    model_type = str(config.get("model_type") or "")
    try:
        found = _of_method(method, given)
    except _NotReadError as error:
        raise InputError(f"{where}: weights quantised with {method}{error} are not read; {_FIX}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{where}: quantization_config in config.json cannot be understood: {error!r}") from error
    return Settings(method=method, model_type=model_type, **found)


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config without its quantisation."""
    inner = {key: without(value) for key, value in config.items() if key == "text_config" and isinstance(value, dict)}
    return {key: value for key, value in {**config, **inner}.items() if key not in _KEYS}


def dtype_of(config: Mapping[str, Any]) -> str:
    """Return the dtype that a config gives for its weights, as safetensors names it; empty if it gives none."""
    blocks = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    said = [block.get(key) for block in blocks for key in ("dtype", "torch_dtype")]
    return next((MERGED[name] for name in said if isinstance(name, str) and name in MERGED), "")


class _NotReadError(Exception):
    """Raised for a quantisation method or variant that is not supported."""


def _given(config: Mapping[str, Any]) -> Iterator[Any]:
    for block in (config, config.get("text_config")):
        if isinstance(block, Mapping):
            yield from (block[key] for key in _KEYS if block.get(key))


def _guessed(given: Mapping[str, Any]) -> str:
    """Guess the method of a config that does not name it, as configs of early versions do not."""
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in given else "a method that it does not name"


def _of_method(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if method not in _READ and method != "intel/auto-round":
        raise _NotReadError("")
    if method.endswith("auto-round"):
        packing = str(given.get("packing_format"))
        if packing not in _ROUNDED:
            raise _NotReadError(f" ({packing})")
        if int(given.get("act_bits") or 16) <= 8:
            raise _NotReadError(f" ({packing} with activations of {given['act_bits']} bits)")
        layout, plus_one = _ROUNDED[packing]
        return {"layout": layout, "plus_one": plus_one, "group_size": int(given.get("group_size") or 0)}
    if method == "modelopt":
        layers = (given.get("quantized_layers") or {}).values()
        algorithms = {each.get("quant_algo") for each in (given, *layers)}
        if refused := sorted(map(str, algorithms - _MODELOPT)):
            raise _NotReadError(f" ({refused[0]})")
        return {}
    if method in ("gptq", "awq"):
        keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
        kind = next((str(given[key]).lower() for key in keys if isinstance(given.get(key), str)), None)
        if kind not in (_GPTQ_FORMATS if method == "gptq" else _AWQ_FORMATS):
            raise _NotReadError(f" in the format {kind}")
        group = given.get("group_size", given.get("q_group_size"))
        return {"layout": method, "plus_one": kind != "gptq_v2", "group_size": int(group or 0)}
    if method == "fp8" and given.get("weight_block_size"):
        rows, columns = given["weight_block_size"]
        return {"block": (int(rows), int(columns))}
    return _of_groups(given) if method == "compressed-tensors" else {}


def _of_groups(given: Mapping[str, Any]) -> dict[str, Any]:
    groups = list((given.get("config_groups") or {}).values())
    formats = {given.get("format"), *(group.get("format") for group in groups)} - {None}
    if refused := sorted(map(str, formats - set(_COMPRESSED))):
        raise _NotReadError(f" in the format {refused[0]}")
    if (sparsity := (given.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise _NotReadError(f" and sparsity ({sparsity})")
    packed, block = [], None
    for weights in (group.get("weights") or {} for group in groups):
        if weights.get("block_structure"):
            rows, columns = weights["block_structure"]
            block = (int(rows), int(columns))
        if weights.get("type", "int") == "int" and int(weights.get("num_bits") or 0) in (2, 4, 8):
            packed.append((int(weights["num_bits"]), max(int(weights.get("group_size") or 0), 0)))
    return {"packed": tuple(packed), "block": block}
