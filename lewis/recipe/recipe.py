"""The recipe: what the user asks for, validated, and the questions that the other wings ask of it."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from lewis.errors import RecipeError, nearest
from lewis.methods import Parameter, find, load_plugins
from lewis.methods.registry import AUTO
from lewis.recipe import dialect, yaml_text
from lewis.recipe.anchor import WEIGHT, Anchor
from lewis.recipe.block import Block, ModelName, Parameters
from lewis.recipe.checks import cross_check
from lewis.recipe.parameter_values import Rule, first_value
from lewis.recipe.problems import describe
from lewis.recipe.schema import (
    GUIDES,
    RECOMMENDED,
    Dtype,
    Evaluate,
    Lewis,
    ModelEntry,
    Output,
    Publish,
    Register,
    Search,
)
from lewis.recipe.slices import OutputSlice, listed_models
from lewis.recipe.tokenizer import ChatTemplate, Tokenizer

MAX_TOLD = 50  # problems of one recipe that an error lists


class Recipe(Block):
    """A validated recipe. Make one with `Recipe.load` or `Recipe.parse`.

    Attributes:
        models: the models that are merged; those of all slices, if there are slices.
        exclude: parts of the names of tensors that are copied from the base unchanged; `*` stands for anything.
    """

    merge_method: str
    base_model: ModelName | None = None
    models: tuple[ModelEntry, ...] = Field(min_length=1)
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
    lewis: Lewis | None = None
    output: Annotated[Output, BeforeValidator(lambda value: {} if value is None else value)] = Output()
    evaluate: Evaluate | None = None
    register_as: Register | None = Field(default=None, alias="register")
    publish: Publish | None = None
    search: Search | None = None
    _root: Path = PrivateAttr(default_factory=Path.cwd)
    _name: str = PrivateAttr(default="recipe")
    _text: str = PrivateAttr(default="")

    @property
    def root(self) -> Path:
        """The recipe's folder: relative paths in it are looked up here first."""
        return self._root

    @property
    def name(self) -> str:
        """The recipe file's name without its ending."""
        return self._name

    @property
    def text(self) -> str:
        """The recipe as YAML, overrides included."""
        return self._text

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read and check a recipe.

        Args:
            path: a YAML file.
            overrides: `key.path=value` each, the value in YAML; applied before the check.

        Raises:
            RecipeError: with every problem found, each beginning with its YAML path.
        """
        path, text = yaml_text.read_file(path)
        return cls.parse(text, root=path.resolve().parent, name=path.stem, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, root: Path, name: str = "recipe", overrides: Sequence[str] = ()) -> "Recipe":
        """Read and check a recipe from its text, as `load`.

        Args:
            text: YAML.
            root: the folder that relative paths in it start from.
            name: what to call the recipe.
            overrides: as for `load`.

        Raises:
            RecipeError: with every problem found, each beginning with its YAML path.
        """
        data = yaml_text.read(text, name)
        for setting in overrides:
            yaml_text.override(data, setting)
        load_plugins()
        if data.get("merge_method") == "recommended":
            data["merge_method"] = RECOMMENDED
        data = dialect.as_recipe(data)
        problems = cross_check(data)
        try:
            sliced = {"models": listed_models(data)} if data.get("slices") else {}
            recipe = cls.model_validate({**data, **sliced})
        except ValidationError as error:
            problems = [*describe(error, cls), *problems]
        if problems:
            problems = list(dict.fromkeys(problems))
            more = [f"and {len(problems) - MAX_TOLD} problems more"] if len(problems) > MAX_TOLD else []
            raise RecipeError([*problems[:MAX_TOLD], *more])
        recipe._root, recipe._name = root, name
        recipe._text = text if not overrides else yaml_text.write(data)
        return recipe

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models that are merged, in the recipe's order.

        For most methods the base has a role of its own: it is no expert, even if the recipe lists it. For the methods
        that treat it as one of the models (linear, karcher), it is an expert, listed or not, as in mergekit; but
        slices list all that they merge.
        """
        if not find(self.merge_method).base_is_a_model:
            return tuple(entry for entry in self.models if entry.model != self.base_model)
        if self.slices or self.base_model is None or self.base_model in {entry.model for entry in self.models}:
            return self.models
        return (*self.models, ModelEntry(model=self.base_model))

    @property
    def vocabulary(self) -> Tokenizer | None:
        """Which vocabulary the result has; None: the base's, which all models must share."""
        return Tokenizer(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    def calibration_of(self, expert: ModelEntry) -> str:
        """The name of the calibration set that `expert` is measured on."""
        assert self.lewis is not None
        return expert.calibration or next(iter(self.lewis.calibrations))

    def value(self, parameter: Parameter, expert: ModelEntry | None, tensor: str, position: float) -> Any:
        """The value of one parameter for one tensor: the model's own, else the top level's, else the default.

        This is mergekit's order.

        Args:
            parameter: as the method declares it.
            expert: whose value it is, if each expert has its own.
            tensor: the tensor's name, which filters are compared with.
            position: depth of the tensor's layer in [0, 1], for gradients; 0 outside the layers.

        Raises:
            RecipeError: if the parameter is required and none of its filters matches the tensor.
        """
        sources = [expert.parameters] if parameter.per_expert and expert is not None else []
        return first_value([*sources, self.parameters], parameter, tensor, position, "parameters")

    def anchor_value(self, parameter: Parameter, expert: ModelEntry | None, tensor: str, position: float) -> Any:
        """As `value`, of the anchor's method: the anchor's own, for `weight` else the recipe's, else the default."""
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

    def check_filters(self, tensors: Iterable[str]) -> None:
        """Check that every filter, and every pattern of `exclude`, matches a tensor.

        Args:
            tensors: the names of all tensors.

        Raises:
            RecipeError: naming each that matches none, and the module with the most similar name.
        """
        names = list(tensors)
        modules = {name.rsplit(".", 1)[0] for name in names} | {re.sub(r"^.*\.\d+\.", "", n) for n in names}
        problems = [
            f"exclude[{i}]: {pattern!r} matches no tensor{nearest(pattern, modules)}"
            for i, pattern in enumerate(self.exclude)
            if not any(_matches([pattern], name) for name in names)
        ]
        for where, parameters in self._parameter_blocks():
            for key, rules in parameters.items():
                for i, rule in enumerate(rules):
                    pattern = rule.filter
                    if pattern not in (None, "*") and not any(pattern in name for name in names):
                        path = f"{where}.{key}[{i}].filter"
                        problems.append(f"{path}: {pattern!r} matches no tensor{nearest(pattern, modules)}")
        if problems:
            raise RecipeError(problems)

    def _parameter_blocks(self) -> list[tuple[str, dict[str, tuple[Rule, ...]]]]:
        own = [(f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(self.models)]
        for i, each in enumerate(self.slices or ()):
            own.append((f"slices[{i}].parameters", each.parameters))
            own += [(f"slices[{i}].sources[{j}].parameters", s.parameters) for j, s in enumerate(each.sources)]
        of_anchor = []
        if self.anchor is not None:
            of_anchor = [("anchor.parameters", self.anchor.parameters), ("anchor", {"weight": self.anchor.weight})]
        return [*own, ("parameters", self.parameters), *of_anchor]

    @property
    def fits(self) -> bool:
        """Whether the merge method fits the projections to the experts on their calibration sets."""
        return find(self.merge_method).fits is not None

    @property
    def tunes(self) -> bool:
        """Whether the ridge of the fit is to be found: `ridge: auto`."""
        return self.fits and self.parameters.get("ridge") == (Rule(AUTO),)

    @property
    def allocator(self) -> Lewis | None:
        """The `lewis` block, if it decides densities: those of the merge, or of the anchor of a method that fits."""
        if self.lewis is None or not self.fits:
            return self.lewis
        given = self.lewis.model_fields_set.intersection(GUIDES)
        guides = self.anchor is not None and any(getattr(self.lewis, key) is not None for key in given)
        return self.lewis if guides else None

    @property
    def guided_method(self) -> str:
        """The method whose densities the `lewis` block decides: the anchor's, if there is one."""
        return self.anchor.merge_method if self.anchor else self.merge_method

    @property
    def guided(self) -> bool:
        """Whether importance decides the densities."""
        return self.allocator is not None and self.allocator.density.strategy != "uniform"

    @property
    def needs_grams(self) -> bool:
        """Whether the merge needs second-order statistics of the experts' inputs, which the importance pass leaves."""
        return find(self.merge_method).fits == "static"

    @property
    def measures(self) -> bool:
        """Whether the merge needs the importance pass of the experts."""
        if self.needs_grams:
            return True
        block = self.allocator
        if block is None:
            return False
        return block.density.strategy not in ("uniform", "depth_gradient") or block.prune_by == "activation"

    @property
    def runs_models(self) -> bool:
        """Whether a model is run, to measure it or to fit the merge to it. Uniform densities need none."""
        return self.measures or self.measures_base or self.fits

    @property
    def compares_norms(self) -> bool:
        """Whether densities come from the difference of norms, which needs those of the base too."""
        block = self.allocator
        return block is not None and (block.density.strategy, block.importance.metric) == ("lewis", "norm_difference")

    @property
    def measures_base(self) -> bool:
        """Whether the merge needs the importance pass of the base."""
        return self.compares_norms or (self.allocator is not None and self.allocator.aim is not None)

    @property
    def wants_uniform(self) -> bool:
        """Whether a second merge with the same mean densities everywhere is made and scored, as a baseline."""
        return self.guided and self.evaluate is not None and "uniform" in self.evaluate.baselines

    @property
    def scores_base(self) -> bool:
        """Whether the base is scored: as a baseline, or because the first champion has to beat it."""
        gated = self.register_as is not None and self.register_as.gate is not None
        return (
            self.base_model is not None and self.evaluate is not None and ("base" in self.evaluate.baselines or gated)
        )

    @property
    def scores_experts(self) -> bool:
        """Whether the experts are scored: as baselines, or because without a base the gate compares with the best."""
        gated = self.register_as is not None and self.register_as.gate is not None
        return self.evaluate is not None and ("experts" in self.evaluate.baselines or (gated and not self.base_model))

    @property
    def label(self) -> str:
        """The merged model's name in tables."""
        return "lewis" if self.guided else "merged"

    @property
    def blocks(self) -> str:
        """What decides the merged weights, as canonical JSON: without `evaluate`, `register`, `publish`, `search`.

        `output` is in it if the merge writes an adapter.
        """
        left_out = {"evaluate", "register_as", "publish", "search"}
        # so that what was cached without them is found
        left_out |= {key for key in ("anchor", "slices", "chat_template") if getattr(self, key) is None}
        left_out |= {"output"} if self.output.kind == "full" else set()
        return self.model_dump_json(exclude=left_out)


def excluded(patterns: Sequence[str], names: Iterable[str], tied: Mapping[str, str]) -> frozenset[str]:
    """The tensors of the base that a recipe excludes from the merge.

    Args:
        patterns: the recipe's `exclude`.
        names: the stored tensors of the base.
        tied: name -> the stored tensor it is tied to. A pattern that matches the name excludes the stored tensor.
    """
    return frozenset(tied.get(name, name) for name in [*names, *tied] if _matches(patterns, name))


def _matches(patterns: Sequence[str], tensor: str) -> bool:
    return any(fnmatch.fnmatchcase(tensor, f"*{pattern}*") for pattern in patterns)
