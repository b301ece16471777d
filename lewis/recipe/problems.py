"""What pydantic finds wrong in a recipe, in words for people, each problem at its YAML path."""

import datetime
import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lewis.errors import nearest
from lewis.recipe.block import Problems
from lewis.recipe.schema import NAME, NOT_BLANK, REPO
from lewis.recipe.serve import TARGETS, URL

_NEEDED = {"base_model", "models", "slices"}  # without them, nothing can be said of the rest
UNSUPPORTED = {"trust_remote_code": "running code that a model brings along"}
MAX_GIVEN = 300  # characters of a wrong value that an error shows
_PATTERNS = {  # what texts of these patterns are, for people
    NAME: "a name, not of dots alone, without / and :",
    REPO: "org/name",
    NOT_BLANK: "a text that is not blank",
    URL: "http://host/path or https://host/path, without user, password and query",
}
# In a problem's location pydantic includes the type that it tried to validate; these names are no keys of the recipe.
_KIND = re.compile(
    r"\[key\]|bool|int|float|str|a range|a list|TokenRow|ModelName|constrained-\w+"
    rf"|(dict|list|tuple|union|literal)\[.*\]|{'|'.join(TARGETS)}"
)


def without_wrong(
    data: dict[str, Any], wrong: frozenset[str], error: ValidationError
) -> tuple[dict[str, Any], frozenset[str]]:
    """Leave out what is wrong in a recipe, so that the rest can be checked.

    Args:
        data: the recipe's data.
        wrong: the keys that have been left out before, as their values are wrong.
        error: what pydantic found wrong in the data.

    Returns:
        The data without unknown keys, and without the top-level keys whose values are wrong in another way; and these.
        An unknown method stays. Empty data if nothing else can be found.
    """
    left, errors = deepcopy(data), _errors(error)
    found = {str(each["loc"][0]) for each in errors if each["loc"] and each["type"] != "extra_forbidden"}
    unknown = [each["loc"] for each in errors if each["type"] == "extra_forbidden"]
    for location in unknown:
        place: Any = left
        for part in location[:-1]:  # which may be the name of a type, and no key
            inside = part in place if isinstance(place, dict) else isinstance(place, list) and isinstance(part, int)
            place = place[part] if inside else place
        if not isinstance(place, dict) or place.pop(location[-1], None) is None:
            found.add(str(location[0]))
    left = {key: value for key, value in left.items() if str(key) not in found - {"merge_method"}}
    ends = found & _NEEDED or not (found - wrong or unknown)
    return ({} if ends else left), wrong | found


def _errors(error: ValidationError) -> list[ErrorDetails]:
    """List what pydantic found, but no list as too short for its invalid items, which have errors of their own."""
    found = error.errors(include_url=False)
    return [e for e in found if not (e["type"] == "too_short" and e["ctx"]["actual_length"] < len(e["input"]))]


def dotted(location: Iterable[Any]) -> str:
    """Return a location as a YAML path: `("models", 0, "model")` as `models[0].model`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """List the problems that pydantic found, each as a line that begins with its YAML path.

    Args:
        error: the error that pydantic raised.
        root: the pydantic class that was validated; it gives the keys that are known at each place.
    """
    lines = []
    for problem in _errors(error):
        location, kind, given = problem["loc"], problem["type"], problem["input"]
        where = dotted(part for part in location if isinstance(part, int) or not _KIND.fullmatch(part))
        if kind == "extra_forbidden":
            key = str(location[-1])
            if len(location) == 1 and key in UNSUPPORTED:
                lines.append(f"{where}: {UNSUPPORTED[key]} is not supported yet; remove it (models and parameters are)")
            else:
                lines.append(f"{where}: unknown key{nearest(key, _keys(root, location[:-1]))}")
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            tag = given.get("kind") if isinstance(given, dict) else given
            lines.append(f"{where}.kind: expected one of {', '.join(TARGETS)}, got {_short(tag)}")
        elif kind == "missing":
            lines.append(f"{where}: missing; it is required")
        elif kind == "value_error":
            found = problem["ctx"]["error"]
            inner = found.lines if isinstance(found, Problems) else [f": {found}"]
            lines += [where + (line if line.startswith(":") or not where else f".{line}") for line in inner]
        elif kind == "string_pattern_mismatch" and (
            words := _PATTERNS.get(problem["ctx"]["pattern"].removeprefix("^$|"))
        ):
            lines.append(f"{where}: expected {words}, got {_short(given)}")
        elif kind == "literal_error":
            lines.append(f"{where}: expected {problem.get('ctx', {})['expected']}, got {_short(given)}")
        else:
            message = re.sub(r"dictionary( or instance of \w+)?", "mapping", str(problem["msg"]))
            message = re.sub("(?i)tuple", "list", message)
            quotes = kind in ("string_type", "invalid_key") and isinstance(given, bool | float | int | datetime.date)
            hint = "; put the text in quotes" if quotes else ""
            lines.append(f"{where}: {message[0].lower()}{message[1:]}, got {_short(given)}{hint}")
    return lines


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= MAX_GIVEN else f"{text[:MAX_GIVEN]}..."


def _keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that are valid at a location of the schema."""
    current: Any = model
    for part in location:
        annotations: list[Any] = []
        if isinstance(current, type) and issubclass(current, BaseModel):
            annotations = [f.annotation for name, f in current.model_fields.items() if part in (name, f.alias)]
        current = TARGETS.get(part, next(iter(_models_in(annotations)), current))
    if not (isinstance(current, type) and issubclass(current, BaseModel)):
        return []
    return [field.alias or name for name, field in current.model_fields.items()]


def _models_in(annotations: Iterable[Any]) -> Iterable[type[BaseModel]]:
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        else:
            yield from _models_in(getattr(annotation, "__args__", ()))
