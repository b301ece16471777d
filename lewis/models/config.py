"""A model's config.json: read it, write it with the dtype of merged weights."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.dtypes import MERGED

logger = logging.getLogger(__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        InputError: if it is missing, no regular file or no valid JSON object.
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


def brings_class(config: Mapping[str, Any]) -> bool:
    """Whether the class of a config or of its network comes with the model: its `auto_map` names one."""
    given = config.get("auto_map")
    return isinstance(given, dict) and any(str(key).startswith(("AutoConfig", "AutoModel")) for key in given)


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value of a config is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def needs_code(folder: Path, what: str, file: str) -> InputError:
    """Return the error for a model that runs only with code of its own, which LEWIS never runs.

    Args:
        folder: of the model.
        what: the part that needs the code, such as `this model`.
        file: name of the file whose `auto_map` names the code.
    """
    return InputError(
        f"{folder}: {what} needs code that comes with it (auto_map in its {file}), which LEWIS never runs; leave the "
        "lewis block out to merge it without guidance"
    )


def own_code(config: Mapping[str, Any]) -> list[str]:
    """The files next to a config that its `auto_map` names as the model's code, sorted; not those of another repo."""
    named = config["auto_map"].values() if isinstance(config.get("auto_map"), dict) else ()
    texts = [
        text for each in named for text in (each if isinstance(each, list) else [each])
    ]  # a tokenizer's: [slow, fast]
    return sorted({f"{each.partition('.')[0]}.py" for each in texts if isinstance(each, str) and "--" not in each})


def write_config(config: Mapping[str, Any], donor: Path, folder: Path, dtype: str | None) -> None:
    """Write config.json with the dtype of the weights, and warn of code that it names and that is not copied.

    Args:
        config: the base's config; that of a quantised base comes without its `quantization_config`.
        donor: the folder of the base. If its config would not change, the file is copied byte by byte.
        folder: where to write.
        dtype: of all floating tensors, as safetensors names it; None if they differ: the config's dtypes then stay.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    if own := own_code(changed):
        logger.warning(
            "%s: config.json names code that comes with the model (auto_map: %s), which is not copied: to load the "
            "result with trust_remote_code, copy the model's *.py files into its folder",
            *(donor, ", ".join(own)),
        )
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
