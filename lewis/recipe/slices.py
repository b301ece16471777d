"""mergekit's `slices`: which layers of which models become the layers of the result, one slice after another."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from lewis.methods import Method
from lewis.recipe.block import Block, ModelName, Parameters

_ENTRY = re.compile(r"^models\[(\d+)\]")
_PARAMETER = re.compile(r"^parameters\.(\w+)")


class SliceSource(Block):
    """Consecutive layers of one model that are merged into a slice.

    Attributes:
        layer_range: number of the first layer, and of the layer after the last.
        parameters: method parameters of this model in this slice.
        calibration: name of the calibration set, as in an entry of `models`.
    """

    model: ModelName
    layer_range: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    parameters: Parameters = Field(default_factory=dict)
    calibration: str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "SliceSource":
        if self.layer_range[0] >= self.layer_range[1]:
            raise ValueError(
                f"layer_range: expected [first, after the last], such as [0, 8] for eight layers, got "
                f"{list(self.layer_range)}"
            )
        return self

    @property
    def layers(self) -> int:
        """How many layers of the model the range has."""
        return self.layer_range[1] - self.layer_range[0]


class OutputSlice(Block):
    """Consecutive layers of the merged model.

    Attributes:
        sources: the layers that are merged: the slice's first layer from the first layer of each source, and so on.
        base_model: base of this slice, in place of the recipe's `base_model`.
        parameters: method parameters of this slice; those of a source override them, and they override the top level's.
    """

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: ModelName | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fit_together(self) -> "OutputSlice":
        counts = [source.layers for source in self.sources]
        if len(set(counts)) > 1:
            raise ValueError(f"expected as many layers of each source, got {', '.join(map(str, counts))}")
        names = [source.model for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"{twice!r} is listed twice in one slice, whose sources are merged with each other; put layers that "
                "follow each other into slices of their own"
            )
        return self

    @property
    def layers(self) -> int:
        """How many layers of the merged model the slice makes."""
        return self.sources[0].layers


def listed_models(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the models of all slices as entries of `models`, each once, in the order of the slices.

    Args:
        data: the raw YAML of the recipe, by `dialect.with_names`; malformed parts are left out, and the schema reports
            them.
    """
    found: dict[str, dict[str, Any]] = {}
    for _, _, source in _sources(data):
        name = source.get("model")
        if isinstance(name, str):
            entry = found.setdefault(name, {"model": name})
            if source.get("calibration") is not None:
                entry.setdefault("calibration", source["calibration"])
    return list(found.values())


def as_merges(data: Mapping[str, Any], method: Method | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each slice's number, and the slice as the raw YAML of a merge of its own, for the checks of a merge.

    Args:
        data: the raw YAML of the recipe.
        method: the recipe's merge method; None if it is unknown.
    """
    whole = data.get("parameters")
    for i, each in enumerate(_slices(data)):
        own, sources = each.get("parameters"), _list(each.get("sources"))
        base = each.get("base_model") or data.get("base_model")
        merge = {key: value for key, value in data.items() if key not in ("tokenizer", "tokenizer_source")}
        merge["base_model"] = None if method is not None and method.base_is_a_model else base
        merge["models"] = [{"model": source.get("model"), "parameters": source.get("parameters")} for source in sources]
        merge["parameters"] = {**(whole if isinstance(whole, dict) else {}), **(own if isinstance(own, dict) else {})}
        yield i, merge


def problems_of(data: Mapping[str, Any], method: Method | None) -> list[str]:
    """List the problems of a recipe's slices as such, each as a line that begins with its YAML path."""
    problems, whole = [], data.get("base_model")
    if data.get("models"):
        problems.append("slices: expected either models or slices, got both; remove one")
    for i, merge in as_merges(data, method):
        base, names = merge["base_model"], [entry["model"] for entry in merge["models"]]
        if base is not None and names and base not in names:
            problems.append(
                f"slices[{i}].sources: the base {base!r} is not among them; list it with the layer_range that the "
                "others are merged onto"
            )
    if data.get("lewis"):
        own = [i for i, each in enumerate(_slices(data)) if each.get("base_model") not in (None, whole)]
        problems += [
            f"slices[{i}].base_model: the lewis block compares all experts with one base; leave one of the two out"
            for i in own
        ]
    sets: dict[str, Any] = {}
    for i, j, source in _sources(data):
        name, wanted = str(source.get("model")), source.get("calibration")
        if wanted is not None and sets.setdefault(name, wanted) != wanted:
            problems.append(f"slices[{i}].sources[{j}].calibration: {name!r} has {sets[name]!r} in another slice")
    return problems


def in_slice(data: Mapping[str, Any], number: int, problem: str) -> str:
    """Return a problem that was found in a slice's merge (`as_merges`) with its YAML path in the recipe."""
    own = _slices(data)[number].get("parameters")
    where = f"slices[{number}]"
    if (match := _PARAMETER.match(problem)) and isinstance(own, dict) and match[1] in own:
        return f"{where}.{problem}"
    if problem.startswith("models:"):
        return f"{where}.sources:{problem.removeprefix('models:')}"
    return _ENTRY.sub(lambda match: f"{where}.sources[{match[1]}]", problem)


def of_listed(data: Mapping[str, Any], problem: str) -> str:
    """Return a problem of an entry of `listed_models` with the YAML path of the first source that names the model."""
    match = _ENTRY.match(problem)
    if match is None:
        return problem
    name = listed_models(data)[int(match[1])]["model"]
    i, j, _ = next(each for each in _sources(data) if each[2].get("model") == name)
    return _ENTRY.sub(f"slices[{i}].sources[{j}]", problem)


def _list(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _slices(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _list(data.get("slices"))


def _sources(data: Mapping[str, Any]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for i, each in enumerate(_slices(data)):
        for j, source in enumerate(_list(each.get("sources"))):
            yield i, j, source
