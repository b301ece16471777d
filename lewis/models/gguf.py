"""Read GGUF files: each gets a model folder in the store, whose tensors are dequantised one by one when they are read.

A GGUF file has neither config.json nor tokenizer.json, and its tensors have llama.cpp's names. transformers has tables
for both. They are used once for each file, to make a folder with the config, the tokenizer, a table of the tensors and
a link to the file. The folder is then read like any other model's; the package `gguf` dequantises. A config.json or
tokenizer.json next to the GGUF file is taken instead of the one that transformers would make.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lewis import private_names, store
from lewis.errors import InputError, LewisError
from lewis.input_files import check_regular, read_json
from lewis.models.config import read_config
from lewis.models.dtypes import DTYPES
from lewis.models.files.folder import GGUF_LINK, GGUF_TABLE, copy_tokenizer, is_of_gguf, tokenizer_files
from lewis.models.files.safetensors_file import Headers
from lewis.models.quantised.stored import Packed
from lewis.store import kinds
from lewis.store.manifest import remembered_sha256, set_damaged_aside

logger = logging.getLogger(__name__)

SEMANTICS = "2"  # bump when the same file would give another folder
_LOST = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")  # settings of RoPE that are stored as tensors
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}  # GGML's numbers of types that are not quantised


def as_folder(ref: str, path: Path) -> Path:
    """Return the folder to read a local model from: the given folder, or the one that is made for a GGUF file.

    Args:
        ref: as in the recipe, for error messages.
        path: a GGUF file, or a folder, which may hold one instead of safetensors.

    Raises:
        InputError: if there are several GGUF files, or transformers cannot make a model of this one.
    """
    if path.is_file():
        return _made(ref, path)
    names = [each.name for each in path.iterdir()] if path.is_dir() else []
    found = sorted(name for name in names if name.endswith(".gguf"))
    if not found or is_of_gguf(path) or any(".safetensors" in name for name in names):
        return path
    return _made(ref, path / only(ref, found))


def only(ref: str, names: list[str]) -> str:
    """Return the name of the only GGUF file of a model.

    Raises:
        InputError: if there are several.
    """
    if len(names) > 1:
        some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise InputError(
            f"{ref}: {len(names)} GGUF files ({some}) and no safetensors; give the path of one of them, downloaded if "
            "need be; a file in several parts is joined by llama-gguf-split --merge"
        )
    return names[0]


def _made(ref: str, path: Path) -> Path:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(f"{ref}: a GGUF file needs the package gguf: pip install lewis-merge[gguf]") from error
    check_regular(path)
    beside = [path.with_name(name) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    facts: list[object] = [SEMANTICS, str(path), *(remembered_sha256(p) for p in (path, *beside) if p.is_file())]
    if path.with_name("tokenizer.json").is_file():  # then `_write_tokenizer` copies these
        copied = [each for each in tokenizer_files(path.parent) if each not in beside]
        facts += [[each.name, remembered_sha256(each)] for each in copied]
    digest = store.digest(facts)
    folder = kinds.GGUF.path(digest)
    with kinds.GGUF.lock(digest):
        set_damaged_aside(folder)
        if not folder.exists():
            with store.publish(folder, {"of": str(path)}) as scratch:
                _fill(ref, path, scratch)
    return folder


def _fill(ref: str, path: Path, folder: Path) -> None:
    (folder / GGUF_LINK).symlink_to(path)
    reader = _reader(ref, path)
    architecture = str(reader.fields["general.architecture"].contents())
    _check_known(ref, architecture)
    dtype = _dtype(reader)
    config = _config(ref, path, architecture, dtype)
    _write_tokenizer(ref, path, folder)
    stored = {
        each.name: [int(each.tensor_type), int(each.data_offset), [int(size) for size in each.data.shape]]
        for each in reader.tensors
    }
    found, shapes, class_name = _names(ref, architecture, config, stored)
    elements = {each.name: int(each.n_elements) for each in reader.tensors}
    for name, parts in found.items():
        values = sum(elements[part] for part in parts)
        if values != math.prod(shapes[name]):
            raise InputError(
                f"{ref}: {name!r} has the shape {list(shapes[name])} by its config, and {values} values in this GGUF "
                "file; put the model's own config.json next to the file"
            )
    if not config.get("architectures"):
        config = {**config, "architectures": [class_name]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: {"from": parts, "shape": list(shapes[name])} for name, parts in found.items()}
    table = {"architecture": architecture, "dtype": dtype, "stored": stored, "tensors": tensors}
    (folder / GGUF_TABLE).write_text(json.dumps(table) + "\n")


def _reader(ref: str, path: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        if "general.architecture" not in reader.fields or not reader.tensors:
            raise ValueError("no architecture or no tensors in it")
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{ref}: truncated, or no GGUF file ({error}); download it again") from error
    return reader


def _check_known(ref: str, architecture: str) -> None:
    """Raise InputError unless transformers has rules to undo llama.cpp's changes of an architecture's values.

    Without the rules, values would be wrong although the names are known: the norms of a Gemma would be off by one.
    """
    tables = (*private_names.GGUF_ARCHITECTURES.get(), *private_names.GGUF_PROCESSORS.get())
    known = {name.replace("-", "_") for name in tables}
    if architecture.replace("-", "_") not in known:
        raise InputError(
            f"{ref}: transformers does not read GGUF files of the architecture {architecture}; use the model's "
            "safetensors"
        )


def _dtype(reader: Any) -> str:
    """Return the dtype of the model, as safetensors names it: that of its matrices, or BF16 if quantised or mixed."""
    kinds_of = {int(each.tensor_type) for each in reader.tensors if len(each.shape) > 1}
    return _PLAIN[kinds_of.pop()] if len(kinds_of) == 1 and kinds_of <= _PLAIN.keys() else "BF16"


def _config(ref: str, path: Path, architecture: str, dtype: str) -> dict[str, Any]:
    from transformers import AutoConfig

    name = DTYPES[dtype].torch_name
    if (path.parent / "config.json").is_file():
        config = read_config(path.parent)
        return config if any(config.get(key) for key in ("dtype", "torch_dtype")) else {**config, "dtype": name}
    try:
        made = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # of any kind, by architecture
        raise InputError(
            f"{ref}: transformers makes no config of a GGUF file of the architecture {architecture} ({_short(error)}); "
            "put the model's config.json next to the file, or use its safetensors"
        ) from error
    return {**made.to_dict(), "dtype": name}


def _write_tokenizer(ref: str, path: Path, folder: Path) -> None:
    if (path.parent / "tokenizer.json").is_file():
        copy_tokenizer(path.parent, folder)
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)
    except Exception as error:  # of any kind, by tokenizer
        logger.warning(
            "%s: transformers makes no tokenizer of this GGUF file (%s): as an expert it is taken to have the base's; "
            "otherwise put the model's tokenizer.json next to the file",
            *(ref, _short(error)),
        )


def _names(
    ref: str, architecture: str, config: dict[str, Any], stored: dict[str, Any]
) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]], str]:
    """Return the file's tensors that each tensor of the model is made of, all shapes, and the name of its class."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    names = private_names.GGUF_NAMES.get()
    try:
        described = AutoConfig.for_model(**config)
        kind = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            # Build it in torch's default dtype: another dtype would have to be set for all threads.
            model = kind.from_config(described, dtype=torch.get_default_dtype())
        processor = _processor(architecture, config)
        own = "llama" if architecture == "llama" else None  # `llama` is also Mistral's
        mapping = names(model, processor, own)
    except Exception as error:  # of any kind, by architecture
        raise InputError(
            f"{ref}: transformers has no names for the tensors of a GGUF file of the architecture {architecture} "
            f"({_short(error)}); use the model's safetensors"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith(_LOST):
            logger.warning(
                "%s: its scaling of RoPE is stored as the tensor %s, which config.json lacks: as a base, put the "
                "model's own config.json next to the file",
                *(ref, name),
            )
        elif (target := mapping.get(name) or mapping.get(name.removesuffix(".weight"))) not in shapes:
            raise InputError(
                f"{ref}: transformers has no place for the tensor {name!r} of this GGUF file in "
                f"{type(model).__name__}; use the model's safetensors"
            )
        else:
            found.setdefault(target, []).append(name)
    tied = set(model.all_tied_weights_keys)
    missing = [name for name, value in model.named_parameters() if name not in found and name not in tied]
    if missing:
        raise InputError(f"{ref}: this GGUF file has no tensor for {missing[0]!r}; use the model's safetensors")
    return found, shapes, type(model).__name__


def _short(error: Exception) -> str:
    with suppress(Exception):
        return " ".join(str(error).split())[:200]
    return type(error).__name__


def open_gguf(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Packed], str]:
    """Open the tensors of a folder that `as_folder` made, without reading them.

    Args:
        folder: with the table of the tensors, and a link to the file.
        config: the parsed config.json: how heads are laid out depends on it.

    Returns:
        Tensor -> how it is computed; and the dtype of all of them, as safetensors names it.

    Raises:
        InputError: if the file is gone, or cut short.
    """
    table = read_json(folder / GGUF_TABLE)
    try:
        with (folder / GGUF_LINK).open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / GGUF_LINK}: the GGUF file cannot be opened ({error}); was it moved?") from error
    file = _File(folder / GGUF_LINK, mapped, table["stored"], table["architecture"], dict(config))
    found = {
        name: Packed({}, tuple(each["shape"]), partial(file.decode, name, each["from"], tuple(each["shape"])))
        for name, each in table["tensors"].items()
    }
    return found, table["dtype"]


def headers(folder: Path) -> Headers:
    """Return dtype and shape of each tensor of a folder that `as_folder` made."""
    table = read_json(folder / GGUF_TABLE)
    return {name: (table["dtype"], tuple(each["shape"])) for name, each in table["tensors"].items()}


class _File:
    def __init__(
        self, path: Path, mapped: mmap.mmap, stored: Mapping[str, Any], architecture: str, config: dict[str, Any]
    ) -> None:
        self._path, self._map = path, mapped
        self._stored, self._architecture, self._config = stored, architecture, config

    def decode(self, name: str, sources: Sequence[str], shape: tuple[int, ...], _: Any) -> np.ndarray:
        """Compute a tensor of the model in fp32: transformers' rules undo what llama.cpp changed in its values."""
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        process = _processor(self._architecture, self._config)
        # Names as transformers' processors look them up: with their ending, and without.
        mapping = {key: name for source in sources for key in (source, source.removesuffix(".weight"))}
        found = None
        for source in sources:
            made = process.process(
                weights=self._values(source), name=source, tensor_key_mapping=mapping, parsed_parameters=parsed
            )
            found = made.weights if made.name is not None else None
        if name in parsed["tensors"]:
            found = parsed["tensors"][name].numpy()
        if found is None or [n for n in found.shape if n != 1] != [n for n in shape if n != 1]:
            given = None if found is None else list(found.shape)
            raise ValueError(f"{sources} give the shape {given}, expected {list(shape)}")
        values = np.ascontiguousarray(found, np.float32).reshape(shape)  # some writers leave dimensions of 1 out
        return values if values.flags.writeable else values.copy()  # not a view of the file

    def _values(self, source: str) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        kind, start, shape = self._stored[source]
        dtype = {0: np.float32, 1: np.float16}.get(kind, np.uint8)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._map.size() < start + size:  # the system would kill the process
            raise LewisError(f"{self._path}: cannot read {source!r}: the file was cut short")
        data = np.frombuffer(self._map, np.uint8, size, start)
        values: np.ndarray = dequantize(data.view(dtype).reshape(shape), GGMLQuantizationType(kind))
        return values


def _processor(architecture: str, config: Mapping[str, Any]) -> Any:
    """Return transformers' processor, which undoes llama.cpp's changes of the values of an architecture."""
    plain = private_names.GGUF_PROCESSOR.get()
    return private_names.GGUF_PROCESSORS.get().get(architecture, plain)(config=config)
