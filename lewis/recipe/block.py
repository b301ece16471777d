"""What all blocks of a recipe share: their base class, and the types of model references and method parameters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lewis.recipe.parameter_values import Rule, parse_setting

Setting = Annotated[tuple[Rule, ...], BeforeValidator(parse_setting)]


def _empty_if_null(value: Any) -> Any:
    return {} if value is None else value


def model_name(value: Any) -> Any:
    """Return a model's reference; mergekit's form {model: {path, revision}, lora: {...}} is turned into text."""
    if isinstance(value, Mapping) and set(value) <= {"model", "lora", "path", "revision"}:
        if "model" in value:
            parts = [model_name(value["model"])] + ([model_name(value["lora"])] if value.get("lora") else [])
            return "+".join(str(part) for part in parts)
        if "path" in value:
            return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")
    return value


def parts_of(ref: str, root: Path | None = None) -> tuple[str, ...]:
    """Split a reference to a model, `model+adapter+adapter`, into its parts: the model, then its adapters in order.

    Args:
        ref: a reference to a model, as in a recipe.
        root: the folder that relative paths start from. An existing folder may have a `+` in its name; without `root`
            no folder is looked for, and every `+` separates two parts.
    """
    pieces, parts = ref.split("+"), list[str]()
    while pieces:
        ends = range(len(pieces), 1, -1)
        end = next((end for end in ends if _exists("+".join(pieces[:end]), root)), 1)
        parts.append("+".join(pieces[:end]))
        pieces = pieces[end:]
    return tuple(parts)


def _exists(ref: str, root: Path | None) -> bool:
    path = os.path.expanduser(ref)
    return root is not None and (os.path.exists(root / path) or os.path.exists(path))


ModelName = Annotated[str, BeforeValidator(model_name), Field(min_length=1)]
Parameters = Annotated[dict[str, Setting], BeforeValidator(_empty_if_null)]


class Block(BaseModel):
    """Base class of all blocks of a recipe: instances are immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
