"""The part of a recipe that defines the merge, in mergekit's format, and what the merge derives from it."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from lewis.errors import RecipeError, nearest
from lewis.methods import METHODS, Parameter, find
from lewis.methods.registry import AUTO
from lewis.recipe.anchor import WEIGHT, Anchor
from lewis.recipe.block import Block, ModelName, Parameters
from lewis.recipe.parameter_values import Rule, first_value
from lewis.recipe.schema import Dtype, ModelEntry, Output
from lewis.recipe.slices import OutputSlice, SliceSource
from lewis.recipe.tokenizer import ChatTemplate, Tokenizer


@dataclass(frozen=True)
class Part:
    """What is merged with each other: all models of a config, or those of one slice.

    Attributes:
        where: YAML path of the list of models.
        base: the base's name; None if the part has none, or merges it like any other model.
        models: YAML path -> a model in the list.
        common: YAML path -> parameters for all these models, the first to look at first.
    """

    where: str
    base: str | None
    models: Mapping[str, ModelEntry | SliceSource]
    common: Mapping[str, Parameters]


class MergeConfig(Block):
    """What is merged and how: the keys of a mergekit config, and LEWIS's own `anchor`, `exclude` and `output`.

    A merge is prepared from this alone; the other blocks of a recipe decide about its inputs, such as densities.

    Attributes:
        models: the models that are merged; with slices, the models of all slices.
        exclude: patterns of tensors that are copied from the base unchanged: parts of names, `*` stands for any text.
    """

    merge_method: str
    base_model: ModelName | None = None
    models: tuple[ModelEntry, ...] = Field(default=(), min_length=1)
    slices: tuple[OutputSlice, ...] | None = Field(default=None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)
    anchor: Anchor | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: ModelName | None = None
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    exclude: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int = Field(default=0, ge=0)
    output: Annotated[Output, BeforeValidator(lambda value: {} if value is None else value)] = Output()
    _root: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _list_models(self) -> Self:
        """List the models of all slices in `models`, each once, in the order of the slices."""
        if self.slices:
            sets: dict[str, str | None] = {}
            for source in (source for each in self.slices for source in each.sources):
                sets[source.model] = sets.get(source.model) or source.calibration
            models = tuple(ModelEntry(model=name, calibration=wanted) for name, wanted in sets.items())
            object.__setattr__(self, "models", models)  # the block is frozen
        return self

    @property
    def parts(self) -> list[Part]:
        """What is merged with each other: one part for each slice, or one for the whole config."""
        if not self.slices:
            listed = {f"models[{i}]": entry for i, entry in enumerate(self.models)}
            return [Part("models", self.base_model, listed, {"parameters": self.parameters})]
        found, method = [], METHODS.get(self.merge_method)
        for i, each in enumerate(self.slices):
            where = f"slices[{i}]"
            base = None if method and method.base_is_a_model else each.base_model or self.base_model
            models = {f"{where}.sources[{j}]": source for j, source in enumerate(each.sources)}
            common = {f"{where}.parameters": each.parameters, "parameters": self.parameters}
            found.append(Part(f"{where}.sources", base, models, common))
        return found

    @property
    def places(self) -> dict[str, str]:
        """Name of a model -> the YAML path of the first entry that names it."""
        found: dict[str, str] = {}
        for path, entry in ((path, entry) for part in self.parts for path, entry in part.models.items()):
            found.setdefault(entry.model, path)
        return found

    @property
    def root(self) -> Path:
        """The recipe's folder: relative paths in the recipe are looked up here first."""
        return self._root

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models that are merged, in the recipe's order.

        For most methods the base has a role of its own: it is no expert, even if the recipe lists it. For the methods
        that treat it as one of the models (linear, karcher), it is an expert, listed or not, as in mergekit; with
        slices only if they list it.
        """
        if not find(self.merge_method).base_is_a_model:
            return tuple(entry for entry in self.models if entry.model != self.base_model)
        if self.slices or self.base_model is None or self.base_model in {entry.model for entry in self.models}:
            return self.models
        return (*self.models, ModelEntry(model=self.base_model))

    @property
    def guided_method(self) -> str:
        """The method whose densities a `lewis` block decides: the anchor's, if there is one."""
        return self.anchor.merge_method if self.anchor else self.merge_method

    @property
    def vocabulary(self) -> Tokenizer | None:
        """The vocabulary of the merged model; None: the base's, which all models must share."""
        return Tokenizer(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    def value(self, parameter: Parameter, expert: ModelEntry | None, tensor: str, position: float) -> Any:
        """The value of one parameter for one tensor: the expert's own, else the top level's, else the default.

        This is mergekit's order.

        Args:
            parameter: as the method declares it.
            expert: the expert whose own value is used, if the parameter has one for each expert.
            tensor: the tensor's name, which filters are compared with.
            position: depth of the tensor's layer in [0, 1], for gradients; 0 outside the layers.

        Raises:
            RecipeError: if the parameter is required and none of its filters matches the tensor.
        """
        sources = [expert.parameters] if parameter.per_expert and expert is not None else []
        return first_value([*sources, self.parameters], parameter, tensor, position, "parameters")

    def anchor_value(self, parameter: Parameter, expert: ModelEntry | None, tensor: str, position: float) -> Any:
        """As `value`, for the anchor's method: the anchor's value, for `weight` else the recipe's, else the default."""
        assert self.anchor is not None
        own = [expert.parameters] if parameter.per_expert and expert is not None else []
        sources = [*own, self.parameters] if parameter.name == "weight" else []
        return first_value([self.anchor.parameters, *sources], parameter, tensor, position, "anchor.parameters")

    def anchor_weight(self, tensor: str, position: float) -> float:
        """The weight of the anchor for one tensor; arguments as those of `value`."""
        assert self.anchor is not None
        return float(first_value([{"weight": self.anchor.weight}], WEIGHT, tensor, position, "anchor"))

    def excludes(self, tensor: str) -> bool:
        """Whether a tensor is copied from the base instead of merged."""
        return _matches(self.exclude, tensor)

    def check_filters(self, tensors: Iterable[str], tied: Mapping[str, str]) -> None:
        """Check that every filter, and every pattern of `exclude`, matches a tensor.

        Args:
            tensors: the names of the base's tensors.
            tied: name -> the tensor that it is tied to. `exclude` may name it, and then means that tensor; a filter
                may not, since the two are merged once, with that tensor's values.

        Raises:
            RecipeError: naming each that matches none, and the module with the most similar name.
        """
        names = [name for name in tensors if name not in tied]
        modules = {name.rsplit(".", 1)[0] for name in names} | {re.sub(r"^.*\.\d+\.", "", n) for n in names}
        problems = [
            f"exclude[{i}]: {pattern!r} matches no tensor{nearest(pattern, modules)}"
            for i, pattern in enumerate(self.exclude)
            if not any(_matches([pattern], name) for name in [*names, *tied])
        ]
        for where, parameters in self._parameter_blocks().items():
            for key, rules in parameters.items():
                for i, rule in enumerate(rules):
                    pattern = rule.filter
                    if pattern not in (None, "*") and not any(pattern in name for name in names):
                        why = f"no tensor{nearest(pattern, modules)}"
                        for head in (head for head in tied if pattern in head):
                            path = tied[head].removesuffix(".weight")
                            why = f"only {head!r}, which the base ties to {tied[head]!r}: filter {path!r}, for both"
                        problems.append(f"{where}.{key}[{i}].filter: {pattern!r} matches {why}")
        if problems:
            raise RecipeError(problems)

    def _parameter_blocks(self) -> dict[str, Parameters]:
        own = {f"{path}.parameters": model.parameters for part in self.parts for path, model in part.models.items()}
        found = own | {path: block for part in self.parts for path, block in part.common.items()}
        if self.anchor is not None:
            found |= {"anchor.parameters": self.anchor.parameters, "anchor": {"weight": self.anchor.weight}}
        return found

    @property
    def fits(self) -> bool:
        """Whether the merge method fits the projections to the experts on their calibration sets."""
        return find(self.merge_method).fits is not None

    @property
    def tunes(self) -> bool:
        """Whether the merge searches for the ridge of its fit (`ridge: auto`)."""
        return self.fits and self.parameters.get("ridge") == (Rule(AUTO),)

    @property
    def needs_grams(self) -> bool:
        """Whether the merge needs second-order statistics of the experts' inputs, which the importance pass writes."""
        return find(self.merge_method).fits == "static"


def excluded(patterns: Sequence[str], names: Iterable[str], tied: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the stored tensors that a merge copies from the base unchanged.

    Args:
        patterns: `exclude` of the recipe.
        names: names of the stored tensors of the base.
        tied: name -> the stored tensor it is tied to. A pattern that matches the name excludes the stored tensor.
    """
    return frozenset(tied.get(name, name) for name in [*names, *tied] if _matches(patterns, name))


def _matches(patterns: Sequence[str], tensor: str) -> bool:
    plain = (pattern.replace("[", "[[]").replace("?", "[?]") for pattern in patterns)  # only * stands for other text
    return any(fnmatch.fnmatchcase(tensor, f"*{pattern}*") for pattern in plain)
