"""What pydantic finds wrong in a recipe, in words for people, each problem at its YAML path."""

import datetime
import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lewis.errors import RecipeError, nearest
from lewis.recipe.block import Problems
from lewis.recipe.schema import NAME, NOT_BLANK, REPO
from lewis.recipe.serve import TARGETS, URL

T = TypeVar("T", bound=BaseModel)
MAX_PROBLEMS = 50  # problems of one recipe that an error lists
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


def validated(model: type[T], data: dict[str, Any], **context: Any) -> T:
    """Validate a recipe. What is wrong in itself is left out after that, to find what else is wrong.

    Args:
        model: the pydantic class of recipes.
        data: the recipe's data.
        context: for the validators. It also gets `wrong`, the top-level keys that are left out as their values are
            wrong, and `known`, the contradictions within blocks that were found before.

    Raises:
        RecipeError: with every problem found.
    """
    problems, wrong, known = list[str](), set[str](), set[str]()
    found, again = None, True
    while again:
        again = False
        try:
            found = model.model_validate(data, context={**context, "wrong": wrong, "known": known})
        except ValidationError as error:
            problems += describe(error, model)
            data = deepcopy(data)
            for each in (each for each in _errors(error) if each["loc"]):
                what, key = each.get("ctx", {}).get("error"), str(each["loc"][0])
                lines = what.lines if isinstance(what, Problems) else ()
                removed = each["type"] == "extra_forbidden" and _remove(data, each["loc"])
                again |= removed or not known.issuperset(lines) or not (lines or key in wrong)
                known.update(lines)
                wrong.update([] if lines or removed else [key])
            left_out = wrong - {"merge_method"}  # with an unknown method, what does not depend on it can be checked
            data = {key: value for key, value in data.items() if str(key) not in left_out}
            again &= wrong.isdisjoint(_NEEDED)
    if problems or found is None:
        listed = list(dict.fromkeys(problems))
        more = [f"and {len(listed) - MAX_PROBLEMS} problems more"] if len(listed) > MAX_PROBLEMS else []
        raise RecipeError([*listed[:MAX_PROBLEMS], *more])
    return found


def _remove(data: Any, location: tuple[Any, ...]) -> bool:
    """Remove a key at a location, which may also name types; return whether it was there."""
    for part in location[:-1]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        data = data[part] if inside else data
    return isinstance(data, dict) and data.pop(location[-1], data) is not data


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
    for part in location:
        annotations = [field.annotation for name, field in model.model_fields.items() if part in (name, field.alias)]
        model = TARGETS.get(part, next(iter(_models_in(annotations)), model))
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotations: Iterable[Any]) -> Iterable[type[BaseModel]]:
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        else:
            yield from _models_in(getattr(annotation, "__args__", ()))
