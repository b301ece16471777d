"""What all blocks of a recipe share: their base class, and the types of model references and method parameters."""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from lewis.recipe.parameter_values import Rule, parse_setting

Setting = Annotated[tuple[Rule, ...], BeforeValidator(parse_setting)]


def _empty_if_null(value: Any) -> Any:
    return {} if value is None else value


def model_name(value: Any) -> Any:
    """Return a model's reference; mergekit's forms {model, lora} and {path, revision} are turned into text.

    Raises:
        ValueError: if it is a mapping of another form, or a part of it is no text.
    """
    if not isinstance(value, Mapping):
        return value
    keys, sign = (("model", "lora"), "+") if "model" in value else (("path", "revision"), "@")
    if keys[0] not in value or not set(value) <= set(keys):
        expected = "expected {model, lora} or {path, revision}, or one text as org/name@revision+adapter"
        raise ValueError(f"{expected}, got the keys {', '.join(map(str, value))}")
    parts = [(key, model_name(value[key])) for key in keys if key == keys[0] or value.get(key) not in (None, "")]
    for key, part in parts:
        if not (isinstance(part, str) and part):
            raise ValueError(f"{key}: expected a text (a number in quotes), got {part!r}")
    return sign.join(part for _, part in parts)


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


def _types_in(annotation: Any) -> set[Any]:
    """The types that an annotation is made of: `dict[str, int] | None` of str, int and NoneType."""
    parts = get_args(annotation)
    return set[Any]().union(*map(_types_in, parts)) if parts else {annotation}


@functools.cache
def _numbers(block: type[BaseModel]) -> set[str]:
    """The keys of a block whose values are numbers, or lists or mappings of numbers."""
    kinds = {field.alias or name: _types_in(field.annotation) for name, field in block.model_fields.items()}
    return {key for key, found in kinds.items() if found & {int, float} and bool not in found}


def _switches_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _switches_as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_switches_as_text(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


class Problems(ValueError):
    """Problems that a validator finds in a block.

    Attributes:
        lines: each begins with the YAML path of a key in the block, or with a colon if it is of the whole block.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


class Block(BaseModel):
    """Base class of all blocks of a recipe: instances are immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """Turn true and false in the place of numbers into texts, which are refused: pydantic takes them as 1 and 0."""
        if not isinstance(data, dict):
            return data
        return {key: _switches_as_text(value) if key in _numbers(cls) else value for key, value in data.items()}

    @model_validator(mode="after")
    def _check_contradictions(self, info: ValidationInfo) -> Self:
        """Raise the block's problems, except those that the context has already."""
        known = (info.context or {}).get("known", ())
        if found := [line for line in self._contradictions() if line not in known]:
            raise Problems(found)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Yield a problem, as in `Problems`, for each key whose value does not fit to another key of the block."""
        return iter(())
