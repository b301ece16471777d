"""What pydantic found wrong with a recipe, in the user's terms: the YAML path, what was expected, what was given."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from lewis.errors import nearest

UNSUPPORTED = {"trust_remote_code": "running code that a model brings along"}
MAX_GIVEN = 300  # characters of a wrong value that are shown
# pydantic puts the kind of value that it tried into the location of a problem; these are not keys of the recipe.
_KIND = re.compile(
    r"bool|int|float|str|a range|a list|TokenRow|ModelName|constrained-\w+|(dict|list|tuple|union|literal)\[.*\]"
)


def dotted(location: Iterable[Any]) -> str:
    """`("models", 0, "model")` as `models[0].model`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Each problem that pydantic found, as a line that begins with its YAML path.

    Args:
        error: what pydantic raised.
        root: the model that was validated; it gives the keys that are known at each place.
    """
    lines = []
    for problem in error.errors():
        location, kind, given = problem["loc"], problem["type"], problem["input"]
        if kind == "too_short" and given:
            continue  # pydantic counts only the valid items; the invalid ones have problems of their own
        where = dotted(part for part in location if not _is_kind(part))
        if kind == "extra_forbidden":
            key = str(location[-1])
            if len(location) == 1 and key in UNSUPPORTED:
                lines.append(f"{where}: {UNSUPPORTED[key]} is not supported yet; remove it (models and parameters are)")
            else:
                lines.append(f"{where}: unknown key{nearest(key, _keys(root, location[:-1]))}")
        elif kind == "missing":
            lines.append(f"{where}: missing; it is required")
        elif kind == "value_error":
            lines.append(f"{where}: {str(problem['msg']).removeprefix('Value error, ')}")
        elif kind == "literal_error":
            lines.append(f"{where}: expected {problem.get('ctx', {})['expected']}, got {_short(given)}")
        else:
            message = re.sub("(?i)tuple", "list", str(problem["msg"]))
            lines.append(f"{where}: {message[0].lower()}{message[1:]}, got {_short(given)}")
    return lines


def _short(given: Any) -> str:
    told = repr(given)
    return told if len(told) <= MAX_GIVEN else f"{told[:MAX_GIVEN]}..."


def _is_kind(part: Any) -> bool:
    """Whether a part of pydantic's location is the kind of value that it tried, not a key."""
    return isinstance(part, str) and _KIND.fullmatch(part) is not None


def _keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that are valid at a location of the schema."""
    current: Any = model
    for part in location:
        annotations: list[Any] = []
        if isinstance(current, type) and issubclass(current, BaseModel):
            annotations = [f.annotation for name, f in current.model_fields.items() if part in (name, f.alias)]
        current = next(iter(_models_in(annotations)), current)
    if not (isinstance(current, type) and issubclass(current, BaseModel)):
        return []
    return [field.alias or name for name, field in current.model_fields.items()]


def _models_in(annotations: Iterable[Any]) -> Iterable[type[BaseModel]]:
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        else:
            yield from _models_in(getattr(annotation, "__args__", ()))
