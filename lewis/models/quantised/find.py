"""Which weights a quantised checkpoint holds, and the stored tensors of each: known by names, dtypes and config."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.models.config import read_config
from lewis.models.dtypes import DTYPES, EIGHT_BIT_FLOATS, MERGED, size_of
from lewis.models.files.folder import is_of_gguf
from lewis.models.files.safetensors_file import Headers, TensorFile
from lewis.models.network.network_class import known_network
from lewis.models.quantised.decode import (
    decode_awq,
    decode_bnb4,
    decode_bnb8,
    decode_fp4,
    decode_gptq,
    decode_mxfp4,
    decode_pack_quantized,
    decode_scaled,
)
from lewis.models.quantised.settings import Settings, dtype_of, settings_of, without
from lewis.models.quantised.stored import Packed, Read, Stored

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")  # next to a `weight`
_UNUSED = (  # of activations, of the key-value cache, and of formats whose weights do not need it
    *("activation_scale", "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
    *("qscale_act", "weight_format"),
)
_BNB = ".quant_state.bitsandbytes__"


def find(
    where: object, config: Mapping[str, Any], headers: Headers, read: Read | None = None
) -> tuple[dict[str, Packed], Headers]:
    """Find the quantised weights of a checkpoint, and the tensors of its model without quantisation.

    Args:
        where: the model, for error messages.
        config: its parsed config.json, which says how it is quantised.
        headers: of its stored tensors.
        read: reads a stored tensor; None if only the headers are known: then the shape of a weight may be unknown.

    Returns:
        Quantised weight -> how it is computed, empty if the config names no quantisation; and dtype and shape of every
        tensor of the model, in the order of the stored ones.

    Raises:
        InputError: if the quantisation is not supported, a part is missing, parts do not fit together, nothing is
            quantised though the config says so, or what is not quantised cannot be merged.
    """
    settings = settings_of(where, config)
    weights, parts = _weights(where, settings, headers, read) if settings else (dict[str, Packed](), set[str]())
    kept = Counter(dtype for name, (dtype, _) in headers.items() if name not in parts)
    most = next((dtype for dtype, _ in kept.most_common() if dtype in MERGED.values()), "BF16")
    default = dtype_of(without(config)) or most
    found: Headers = {}
    first = {next(iter(packed.parts.values())): name for name, packed in weights.items()}
    for stored, header in headers.items():
        if name := first.get(stored):
            found[name] = (weights[name].dtype or default, weights[name].shape)
        elif stored not in parts:
            found[stored] = header
    _check_plain(where, found, settings)
    return weights, found


def dequantised(where: object, folder: Path, headers: Headers, files: Mapping[str, Collection[str]] | None) -> Headers:
    """Return dtype and shape of each tensor of a model, by its name from before the quantisation.

    Args:
        where: the model, for error messages.
        folder: with its config.json.
        headers: of its stored tensors.
        files: name of each weight file -> its tensors; None if they are not in the folder yet.

    Raises:
        InputError: if it is quantised in a way that is not supported, or a part is missing.
    """
    if not (folder / "config.json").is_file():
        return dict(headers)
    opened: dict[str, TensorFile] = {}

    def read(name: str) -> Stored:
        file = next(file for file, names in (files or {}).items() if name in names)
        if file not in opened:
            opened[file] = TensorFile(folder / file)
        return Stored(*headers[name], opened[file].bits(name))

    weights, found = find(where, read_config(folder), headers, read if files else None)
    if unknown := {name for name, packed in weights.items() if packed.decode is _not_here}:
        found |= {name: (found[name][0], shape) for name, shape in _of_class(folder, found, unknown).items()}
    return found


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a model folder are computed from others: its config says so, or it is a GGUF file's."""
    if is_of_gguf(folder):
        return True
    return (folder / "config.json").is_file() and settings_of(folder, read_config(folder)) is not None


def _weights(
    where: object, settings: Settings, headers: Headers, read: Read | None
) -> tuple[dict[str, Packed], set[str]]:
    """The quantised weights; and the stored tensors that they are computed from, or that no weight needs."""
    if smoothed := next((name for name in headers if name.endswith(".pre_quant_scale")), None):
        raise InputError(
            f"{where}: {smoothed!r}: activations are multiplied before they come to this weight, which a merge cannot "
            "do; use the unquantised model"
        )
    finder = _Finder(where, settings, headers, read)
    weights = dict[str, Packed]()
    parts = {name for name in headers if name.rpartition(".")[2] in _UNUSED or _BNB in name}
    for name in headers:
        try:
            for weight, packed in finder.weights_at(name):
                if settings.stores_transposed(weight):
                    packed = _transposed(packed)
                weights[weight] = packed
                parts.update(packed.parts.values())
        except (ValueError, KeyError, IndexError, ZeroDivisionError, TypeError) as error:
            raise InputError(f"{where}: {name!r} cannot be read as {settings.method}: {error!r}") from error
    if not weights:
        raise InputError(
            f"{where}: config.json says that the weights are quantised ({settings.method}), but no tensor is stored "
            "so; remove quantization_config from it if they are not, else take the config.json of these weights"
        )
    return weights, parts


def _check_plain(where: object, headers: Headers, settings: Settings | None) -> None:
    """Raise InputError if one of the model's tensors is still quantised."""
    for name, (dtype, shape) in headers.items():
        whole = name.endswith("weight") and dtype in ("I8", "U8", "I32") and len(shape) > 1
        if dtype in DTYPES and dtype not in EIGHT_BIT_FLOATS and not whole and not name.endswith(".qweight"):
            continue
        what = f"{where}: tensor {name!r} is stored as {dtype}"
        if settings is None:
            raise InputError(
                f"{what}: a quantised checkpoint without its quantization_config, which says how to read it; take the "
                "config.json of the repository that these weights are from, or the unquantised model"
            )
        raise InputError(
            f"{what}, and {settings.method} has no such weight without a scale next to it; download the model again, "
            "or use the unquantised one"
        )


def _transposed(packed: Packed) -> Packed:
    def decode(parts: Any) -> np.ndarray:
        return np.ascontiguousarray(packed.decode(parts).T)

    return replace(packed, shape=packed.shape[::-1], decode=decode)


class _Finder:
    def __init__(self, where: object, settings: Settings, headers: Headers, read: Read | None) -> None:
        self._where, self._settings, self._headers, self._read = where, settings, headers, read

    def weights_at(self, name: str) -> Iterator[tuple[str, Packed]]:
        """Yield the quantised weight that has a stored tensor as its main part, if there is one."""
        dtype, _ = self._headers[name]
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            yield f"{module}.weight", self._of_words(module)
        elif leaf == "weight_packed":
            yield f"{module}.weight", self._of_packed(module)
        elif leaf.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in self._headers:
            yield name.removesuffix("_blocks"), self._of_blocks(name.removesuffix("_blocks"))
        elif state := next((key for kind in ("nf4", "fp4") if (key := f"{name}{_BNB}{kind}") in self._headers), None):
            yield name, self._of_bnb4(name, state)
        elif dtype == "I8" and f"{module}.SCB" in self._headers:
            yield name, Packed({"weight": name, "SCB": f"{module}.SCB"}, self._shape(name), decode_bnb8)
        elif dtype in (*_FP8, "I8", "U8"):
            yield from self._of_scaled(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._headers:
            raise InputError(f"{self._where}: the tensor {name!r} is missing, which the quantised weight needs")
        return self._headers[name][1]

    def _present(self, **names: str) -> dict[str, str]:
        return {role: name for role, name in names.items() if name in self._headers}

    def _of_words(self, module: str) -> Packed:
        """Describe a weight of GPTQ or AWQ."""
        settings = self._settings
        names = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
        packed, zeros, (groups, outputs) = (self._shape(name) for name in names.values())
        if settings.layout == "awq":
            if packed[1] * 8 != outputs:
                raise ValueError(f"qweight {list(packed)} and scales {[groups, outputs]} are not 4-bit GEMM")
            return Packed(names, (outputs, packed[0]), decode_awq)
        bits = 32 * zeros[1] // outputs
        inputs = packed[0] * 32 // bits
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"qzeros {list(zeros)} and scales {[groups, outputs]} are of {bits} bits")
        group = settings.group_size
        if group <= 0 or -(-inputs // group) != groups:
            group = -(-inputs // groups)
        parts = {**names, **self._present(g_idx=f"{module}.g_idx")}
        decode = partial(decode_gptq, bits=bits, group=group, plus_one=settings.plus_one)
        return Packed(parts, (outputs, inputs), decode)

    def _of_packed(self, module: str) -> Packed:
        """Describe a weight of compressed-tensors: words of whole numbers, or bytes of two fp4 numbers."""
        main, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        (dtype, shape), grid = self._headers[main], self._shape(scale)
        if dtype == "U8":
            parts = {"weight": main, "scale": scale, **self._present(**{"global": f"{module}.weight_global_scale"})}
            return Packed(parts, (*shape[:-1], 2 * shape[-1]), partial(decode_fp4, divided=True))
        outputs, columns = shape
        stated = f"{module}.weight_shape"
        inputs = None
        if self._read is not None and stated in self._headers:
            inputs = int(self._read(stated).whole()[1])
        bits, inputs, group = self._settings.bits_of(columns, grid[1] if len(grid) > 1 else 1, inputs)
        parts = {"packed": main, "scale": scale}
        parts |= self._present(zero=f"{module}.weight_zero_point", g_idx=f"{module}.weight_g_idx", shape=stated)
        whole = (outputs, inputs)
        return Packed(parts, whole, partial(decode_pack_quantized, bits=bits, group=group, shape=whole))

    def _of_blocks(self, name: str) -> Packed:
        """Describe a weight of MXFP4 as gpt-oss stores it."""
        experts, outputs, groups, half = self._shape(f"{name}_blocks")
        parts = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
        return Packed(parts, (experts, 2 * groups * half, outputs), decode_mxfp4)

    def _of_bnb4(self, name: str, state_name: str) -> Packed:
        own = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        parts = {"weight": name, **self._present(**{part: f"{name}.{part}" for part in own})}
        for part in ("absmax", "quant_map"):
            self._shape(f"{name}.{part}")
        if self._read is None:
            dtype, shape = self._headers[name]
            return Packed(parts, (2 * size_of(dtype, shape),), _not_here)  # two numbers to the byte
        state = json.loads(self._read(state_name).bytes().tobytes())
        shape = tuple(int(size) for size in state["shape"])
        decode = partial(decode_bnb4, state=state, shape=shape)
        return Packed(parts, shape, decode, MERGED.get(state.get("dtype", ""), ""))

    def _of_scaled(self, name: str) -> Iterator[tuple[str, Packed]]:
        module, dtype, shape = name.rpartition(".")[0], *self._headers[name]
        scales = [f"{name}_scale_inv", f"{name}_scale"]  # the second: experts of Llama 4
        if name.endswith(".weight"):
            scales += [f"{module}.{scale}" for scale in _SCALES]
        scale = next((each for each in scales if each in self._headers), None)
        if scale is None:
            return
        grid = self._headers[scale][1]
        if dtype == "U8" or (dtype == "I8" and self._headers[scale][0] in ("F8_E8M0", "U8")):  # two fp4 to the byte
            parts = {"weight": name, "scale": scale, **self._present(**{"global": f"{module}.weight_scale_2"})}
            yield name, Packed(parts, (*shape[:-1], 2 * shape[-1]), partial(decode_fp4, divided=False))
            return
        if f"{module}.weight_g_idx" in self._headers:
            raise ValueError("groups that are not in order (weight_g_idx) are read from packed weights only")
        if math.prod(grid) > 1 and math.prod(shape) % math.prod(grid) and not self._settings.block:
            raise ValueError(f"scales {list(grid)} do not divide the weight {list(shape)}")
        parts = {"weight": name, "scale": scale, **self._present(zero=f"{module}.weight_zero_point")}
        grid = self._grid(grid, shape)
        yield name, Packed(parts, shape, partial(decode_scaled, block=self._settings.block, grid=grid))

    def _grid(self, scales: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of scales as a grid over their weight, for any shape that they are stored in."""
        if len(scales) == 4 and len(shape) == 2:  # ModelOpt's blocks: (grid rows, 1, grid columns, 1)
            return scales[::2]
        if self._settings.method == "fbgemm_fp8" and scales == (shape[0], shape[-1], 1) and len(shape) == 3:
            return (shape[0], 1, shape[-1])  # Llama 4's down_proj is stored (experts, in, out), its scales (.., out, 1)
        return scales


def _not_here(parts: Any) -> np.ndarray:
    """Raise an error: the `decode` of a weight of which only the header was read, so that its shape is not known."""
    raise AssertionError("only the headers of this model have been read")


def _of_class(folder: Path, found: Headers, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of some tensors in the model's class, if they have as many elements as the stored tensors."""
    network = known_network(folder)
    shapes = {} if network is None else {name: tuple(value.shape) for name, value in network.state_dict().items()}
    return {
        name: shapes[name] for name in names if name in shapes and math.prod(shapes[name]) == math.prod(found[name][1])
    }
