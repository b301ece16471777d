"""A model's config.json: read it, compare it with the tensors, write it with the dtype of merged weights."""

import json
import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.config_class import added_rows, check_values, takes_null
from lewis.models.config_sizes import unlike_names
from lewis.models.dtypes import MERGED
from lewis.models.names import EMBEDDINGS, Shapes, in_layers

_WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model")  # each is a dimension of some tensor
_PARTS = ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim")  # each divides one
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")  # null: the class computes it
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
_COUNTS = (*_WIDTHS, *_PARTS, *_INNER, *_DEPTHS, "vocab_size")
_POSITIONS = ("max_position_embeddings", "n_positions")
_LAYER = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks|encoder\.layer))\.(\d+)\.")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        InputError: if it is missing, no regular file or no valid JSON.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no config.json; expected the folder of a Hugging Face model") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if not isinstance(config.get("text_config") or {}, dict):
        raise InputError(f"{path}: text_config: expected a JSON object, got {config['text_config']!r}")
    return config


def needs_code(folder: Path, what: str, file: str) -> InputError:
    """The error about a model that cannot be run because code comes with it.

    Args:
        folder: of the model.
        what: needs the code, such as `this model`.
        file: whose `auto_map` says so.
    """
    return InputError(
        f"{folder}: {what} needs code that comes with it (auto_map in its {file}), which LEWIS never runs; leave the "
        "lewis block out to merge it without guidance"
    )


def write_config(config: Mapping[str, Any], donor: Path, folder: Path, dtype: str | None) -> None:
    """Write config.json with the dtype of the weights.

    Args:
        config: the base's, to be written. Of a quantised base it is already without `quantization_config`.
        donor: the folder of the base. If its config would not change, the file is copied byte by byte.
        folder: where to write.
        dtype: of all floating tensors, as safetensors names it; None if they differ.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    name = next((name for name, stored in MERGED.items() if stored == dtype), None)
    if name:
        keys = [key for key in ("dtype", "torch_dtype") if key in changed] or ["torch_dtype"]
        changed.update(dict.fromkeys(keys, name))
        for inner in changed.values():
            if isinstance(inner, dict):
                inner.update({key: name for key in ("dtype", "torch_dtype") if inner.get(key)})
    given = donor / "config.json"
    if given.is_file() and changed == json.loads(given.read_bytes()):
        shutil.copyfile(given, folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n")


def _check_numbers(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Check the sizes that a config gives, of the whole model and of its `text_config`, without building the network.

    The width must be a dimension of some tensor, and heads must divide one; the inner size and the vocabulary must not
    be larger than there are tensors for. Of several towers each is checked against all tensors. Whether the class of
    the config takes null for an inner size is left to `check_values`.

    Args:
        folder: of the model.
        config: parsed.
        shapes: of its tensors.

    Raises:
        InputError: naming the key, what was expected and what was given.
    """
    sizes = {size for shape in shapes.values() for size in shape}
    spared = {"head_dim"} | (set() if in_layers(shapes) else {*_DEPTHS})  # keys that may be 0
    embeds = any(name.endswith(EMBEDDINGS) for name in shapes)  # whose rows `check_config` compares
    text = config.get("text_config") or {}
    for where, block in (("", config), ("text_config.", text)):
        given = {key: block[key] for key in (*_COUNTS, *_POSITIONS) if key in block}
        for key, value in given.items():
            optional = key in (*_PARTS[2:], *_INNER) or (key == "vocab_size" and takes_null(block, key))
            if value is None and optional:
                continue
            against = set() if key == "vocab_size" and embeds else sizes
            if expected := _unlike_size(key, value, 0 if key in spared else 1) or _unlike_tensors(key, value, against):
                raise InputError(
                    f"{folder}: config.json: {where}{key}: expected {expected}, got {str(value)[:80]}; no network can "
                    "be built of it: take the config.json that came with these weights"
                )
    for key, expected in (*unlike_names(config, shapes), *_unlike_biases(config, shapes)):
        raise InputError(
            f"{folder}: config.json: {key}: expected {expected}, got {_at(config, key)}; take the config.json that "
            "came with these weights"
        )
    if _holds_nan(config):
        raise InputError(f"{folder}: config.json: holds NaN; take the config.json that came with these weights")


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None if the config does not say."""
    block, _, last = key.rpartition(".")
    return (config[block] if block else config).get(last)


def _unlike_size(key: str, value: Any, least: int) -> str:
    """What was expected of a size in config.json, for an error message; empty if the value is a valid size.

    A list or mapping holds a size for each layer or tower; all are checked.
    """
    each = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if key in _POSITIONS:  # transformers has defaults that are no whole numbers
        fine = all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one < math.inf for one in each)
        return "" if fine else "a number above 0"
    fine = all(isinstance(one, int) and not isinstance(one, bool) and one >= least for one in each)
    return "" if fine and each else "a whole number above 0"


def _unlike_tensors(key: str, value: Any, sizes: Collection[int]) -> str:
    """What was expected of a size by the tensors' shapes, for an error message; empty if it fits or is no number."""
    if not isinstance(value, int) or not value or not sizes:
        return ""
    if key in _WIDTHS and value not in sizes:
        return "a dimension of one of the tensors"
    if key in _PARTS and all(size % value for size in sizes):
        return "a number that divides a dimension of one of the tensors"
    most = max(sizes) * (4 if key in _INNER else 1)  # some networks use two thirds of this
    if key in (*_INNER, "vocab_size") and value > most:
        return f"at most {most}, by the largest dimension of the tensors"
    return ""


def _unlike_biases(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Key -> what was expected, where a config gives biases to a part that has none."""
    for key, part in (("attention_bias", "att"), ("mlp_bias", "mlp")):
        if config.get(key) is True and not any(part in name and name.endswith(".bias") for name in shapes):
            yield key, "false, as no tensor is such a bias"


def _holds_nan(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


def check_config(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Check the values of a config by the class of its `model_type`, and its sizes by the tensors.

    A config that speaks of several towers (`text_config`, `vision_config`) must be right about one of them.

    Raises:
        InputError: naming the key and the tensors that contradict it.
    """
    _check_numbers(folder, config, shapes)
    check_values(folder, config)
    rows = {name: shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and shape}
    stated = set(_stated(config, "vocab_size"))
    blocks = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    more = {*_stated(config, "additional_vocab_size"), *(each for block in blocks for each in added_rows(block))}
    beyond = {count + each for count in stated for each in more}
    if rows and stated and not (stated | beyond) & set(rows.values()):
        name, count = next(iter(rows.items()))
        raise InputError(
            f"{folder}: config.json says vocab_size {_listed(stated)}, but {name!r} has {count} rows; "
            "the config belongs to another model"
        )
    stacks = _stacks(shapes)
    stated = set(_stated(config, "num_hidden_layers", "n_layer"))
    others = set(_stated(config, "num_layers_per_stack", "num_blocks"))  # keys of HRM and xLSTM
    spare = max(_stated(config, "num_nextn_predict_layers"), default=0)  # stored after the layers that count
    if (
        stacks
        and stated
        and not any(count - more in stated | others for count in stacks.values() for more in {0, spare})
    ):
        prefix, count = max(stacks.items(), key=lambda stack: stack[1])
        raise InputError(
            f"{folder}: config.json says num_hidden_layers {_listed(stated)}, but the tensors {prefix}.* are of "
            f"{count} layers; the config belongs to another model"
        )


def _stated(config: Mapping[str, Any], *keys: str) -> Iterator[int]:
    """The whole numbers that a config, or a block in it, gives for a key."""
    for block in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in keys:
            value = block.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield value


def _stacks(names: Mapping[str, Any]) -> dict[str, int]:
    """What comes before the number in the names of a stack of layers -> how many layers it has."""
    found: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))
