"""A model's config.json: read it, compare it with the tensors, write it with the dtype of merged weights."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.dtypes import MERGED
from lewis.models.names import EMBEDDINGS

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
        config: the base's, as its weights are read: a quantised one has lost its quantisation.
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
    if given.is_file() and changed == json.loads(given.read_text()):
        shutil.copyfile(given, folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n")


def check_config(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check `vocab_size` and `num_hidden_layers` of a config against the tensors; where one is silent, nothing is.

    A config that speaks of several towers (`text_config`, `vision_config`) must be right about one of them.

    Raises:
        InputError: naming the key and the tensors that contradict it.
    """
    rows = {name: shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and shape}
    stated = set(_stated(config, "vocab_size"))
    # One more row: Moshi has a token that begins a text; Mllama has eight for its images.
    more = {1} | ({8} if "mllama" in str(config.get("model_type")) else set())
    beyond = {count + each for count in stated for each in more}
    if rows and stated and not (stated | beyond) & set(rows.values()):
        name, count = next(iter(rows.items()))
        raise InputError(
            f"{folder}: config.json says vocab_size {_listed(stated)}, but {name!r} has {count} rows; "
            "the config belongs to another model"
        )
    stacks = _stacks(shapes)
    stated = set(_stated(config, "num_hidden_layers", "n_layer"))
    others = set(_stated(config, "num_layers_per_stack"))  # HRM: the layers count once for each of its stacks
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
