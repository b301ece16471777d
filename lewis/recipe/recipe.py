"""The recipe: a mergekit config with the blocks `lewis`, `evaluate`, `register` and others (DESIGN, section 3)."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from lewis.errors import InputError, RecipeError
from lewis.methods import Parameter, find, load_plugins
from lewis.recipe.checks import cross_check, describe, nearest
from lewis.recipe.presets import with_preset
from lewis.recipe.settings import Rule, parse_setting, value_at

Setting = Annotated[tuple[Rule, ...], BeforeValidator(parse_setting)]
Dtype = Literal["float32", "float16", "bfloat16"]


def _empty_if_null(value: Any) -> Any:
    return {} if value is None else value


def _model_name(value: Any) -> Any:
    """mergekit also writes a model as {model: {path, revision}, lora: {path, revision}}."""
    if isinstance(value, Mapping) and set(value) <= {"model", "lora", "path", "revision"}:
        if "model" in value:
            parts = [_model_name(value["model"])] + ([_model_name(value["lora"])] if value.get("lora") else [])
            return "+".join(str(part) for part in parts)
        if "path" in value:
            return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")
    return value


ModelName = Annotated[str, BeforeValidator(_model_name), Field(min_length=1)]
Parameters = Annotated[dict[str, Setting], BeforeValidator(_empty_if_null)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TokenRow(_Block):
    """Where a token's row comes from, if not from the model of its name: 0, or the row of a token of a model."""

    kind: Literal["zero", "model_token"]
    model: ModelName | None = None
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_row(self) -> "TokenRow":
        given = (self.model, self.token if self.token is not None else self.token_id)
        if self.kind == "zero" and (given != (None, None)):
            raise ValueError("kind zero takes no model or token")
        if self.kind == "model_token" and (None in given or None not in (self.token, self.token_id)):
            raise ValueError("kind model_token needs a model, and either token or token_id")
        return self


def _kind_of_source(value: Any) -> str:
    return "TokenRow" if isinstance(value, TokenRow) or (isinstance(value, dict) and "kind" in value) else "ModelName"


class TokenEmbedding(_Block):
    """The row of one token, in the models that lack it, or with `force` in all; by the usual rule without a source."""

    source: (
        Annotated[
            Annotated[ModelName, Tag("ModelName")] | Annotated[TokenRow, Tag("TokenRow")],
            Discriminator(_kind_of_source),
        ]
        | None
    ) = None
    force: bool = False


class Tokenizer(_Block):
    """Whose vocabulary the result has: mergekit's `tokenizer`.

    Attributes:
        source: `base`, `union`, or one of the models.
        tokens: token -> where its row comes from; one that there is not is added.
        pad_to_multiple_of: embeddings get no more rows than tokens, rounded up to a multiple of this.
    """

    source: ModelName = "union"
    tokens: dict[Annotated[str, Field(min_length=1)], TokenEmbedding] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class ModelEntry(_Block):
    """One model of the merge."""

    model: ModelName
    parameters: Parameters = Field(default_factory=dict)
    calibration: str | None = None


class CalibrationSet(_Block):
    """Where calibration texts come from: a dataset (of the Hub, or `json`/`parquet` files), or `texts` given inline.

    Attributes:
        padding: with `max_tokens`, each sample is filled up with end-of-text tokens, which count like all others (the
            authors' way).
    """

    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    text: str | None = None
    texts: tuple[str, ...] | None = None
    samples: int = Field(default=128, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    seed: int = Field(default=42, ge=0)
    padding: Literal["none", "max_tokens"] = "none"

    @model_validator(mode="after")
    def _one_source(self) -> "CalibrationSet":
        if (self.dataset is None) == (self.texts is None):
            raise ValueError("expected either `dataset` or inline `texts`")
        if self.dataset is not None and not self.text:
            raise ValueError('expected `text`, a template such as "{question} {answer}" that turns a row into text')
        if self.dataset in ("json", "parquet") and not self.data_files:
            raise ValueError(f"dataset {self.dataset!r} needs `data_files`")
        if self.texts is not None and (self.text or self.data_files or self.config):
            raise ValueError("inline `texts` take no `text`, `config` or `data_files`")
        return self


class Importance(_Block):
    """How importance is measured, and how far a layer moved.

    Attributes:
        metric: how far a layer moved, for `strategy: lewis`: `norm_difference` (LEWIS's), `delta_norm` (the norm of the
            activation-weighted task vector), or `outlier` (its share of outliers, as OWL's).
        prune_ratio: share of each row's weights that is pruned by Wanda before a layer's output feeds the next, as the
            authors' code does (0.5).
        reduce: activations as the `mean` over all tokens, or the `sum` over those of a sample (the authors').
    """

    metric: Literal["norm_difference", "delta_norm", "outlier"] = "norm_difference"
    prune_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    reduce: Literal["mean", "sum"] = "mean"


class Density(_Block):
    """How densities are allocated.

    Attributes:
        strategy: `lewis`, `owl`, `dlp`, `depth_gradient` (see `lewis.allocation.strategies`), `global` (one threshold
            over all tensors, see `lewis.allocation.global_threshold`) or `uniform` (the same everywhere).
        min, max: bounds of every density, 0 < min <= max <= 1.
        budget: if given, the exact parameter-weighted mean density of the covered tensors. Without one, `lewis` and
            `depth_gradient` give what they give, and the others have the midpoint of the bounds as their mean.
        scale: how `lewis` brings its shares to the bounds: `minmax`, by `rank`, or `robust` against outliers.
        decimals: to which `lewis` rounds its shares first, as the authors' code does (5).
        uncovered: density of all other tensors: `expert` 1, `base` 0, `mean` that of the covered tensors.
    """

    strategy: Literal["lewis", "uniform", "owl", "dlp", "depth_gradient", "global"] = "lewis"
    min: float = Field(default=0.3, gt=0, le=1)
    max: float = Field(default=0.8, gt=0, le=1)
    budget: float | None = Field(default=None, gt=0, le=1)
    scale: Literal["minmax", "rank", "robust"] = "minmax"
    decimals: int | None = Field(default=None, ge=1)
    uncovered: Literal["expert", "base", "mean"] = "expert"


class Aim(_Block):
    """Hold the merged delta back where the base's activations are large (`lewis.allocation.aim`, arXiv 2502.02421).

    Attributes:
        omega: what is left of the delta in the input channel that the base uses most; 1 changes nothing.
    """

    omega: float = Field(default=0.4, ge=0, le=1)


class Lewis(_Block):
    """The LEWIS block: calibration sets, importance, densities.

    Attributes:
        aim: a step after the merge, of the covered tensors; the base is measured on every set that an expert has.
        preset: `lewis_official` sets what the authors' code does (`lewis.recipe.presets`).
        prune_by: which elements of a task vector a method that trims by size keeps: those of the largest |delta|, or,
            by `activation`, of the largest |delta| * sqrt(s), s from the expert's own calibration set.
    """

    preset: Literal["lewis_official"] | None = None
    calibrations: dict[str, CalibrationSet] = Field(default_factory=dict)
    importance: Importance = Importance()
    prune_by: Literal["magnitude", "activation"] = "magnitude"
    density: Density = Density()
    aim: Aim | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, data: Any) -> Any:
        return with_preset(data) if isinstance(data, dict) else data


class Evaluate(_Block):
    """What lm-eval scores.

    Attributes:
        tasks: names of its own tasks or groups, or YAML files beside the recipe.
        documents: `all`, or one of two disjoint halves of every task's documents; the limit counts within it.
        weights: task, or `task/metric,filter` -> its share of the score `weighted/mean,none`; a task stands for its
            first metric. Empty: there is no such score.
        allow_code_execution: whether task files beside the recipe may run what a model writes (`unsafe_code: true`).
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | float | None = Field(default=None, gt=0)
    documents: Literal["all", "search", "confirm"] = "all"
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 16
    timeout_minutes: float = Field(default=60, gt=0)
    allow_code_execution: bool = False
    baselines: tuple[Literal["base", "experts", "uniform"], ...] = ("base", "experts", "uniform")


class Gate(_Block):
    """The rules of promotion, against the champion, or the base before there is one.

    Attributes:
        metric: `task/metric,filter`, or `weighted/mean,none`.
        min_gain: what it must gain at least.
        superiority: whether the paired 95 % interval of its gain must lie above 0; by default, unless `min_gain` is
            negative.
        tolerance: how much worse than the reference each task may be shown not to be, in all or by task or
            `task/metric,filter`: absolute for scores between 0 and 1, else relative to the reference's value.
        allow_limit: whether a run with `evaluate.limit` may promote.
    """

    metric: str
    min_gain: float = 0.0
    superiority: bool | None = None
    tolerance: Annotated[float, Field(ge=0)] | dict[str, Annotated[float, Field(ge=0)]] = 0.05
    allow_limit: bool = False


class Register(_Block):
    """The registered model in MLflow."""

    name: str = Field(pattern=r"^[^/:]+$")
    gate: Gate | None = None


class Publish(_Block):
    """The Hub repo that the champion is pushed to.

    Attributes:
        repo: `org/name`; made if there is none.
        private: how it is made, and what it must be.
    """

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    private: bool = True


class Range(_Block):
    """What a search may choose a number from: `min` to `max`, on a `log` scale, or in steps of `step` from `min`."""

    min: float
    max: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.min >= self.max:
            raise ValueError(f"expected min < max, got min={self.min:g}, max={self.max:g}")
        if self.log and (self.min <= 0 or self.step):
            raise ValueError("a log scale needs min > 0, and takes no step")
        return self


class Search(_Block):
    """Values of the recipe to search for (`lewis search`).

    Attributes:
        space: YAML path, as in `--set` -> a range, or a list of choices.
        trials: how many to make in all.
        minutes: begin no further trial after this time; None: no limit.
        metrics: one or two of `task/metric,filter`; the gate's metric if none is given. Two: a Pareto front is
            searched, and the first decides among the trials on it.
        parallel: trials at a time.
        prune: give a trial up that is behind after the first quarter of the documents; only for one metric.
        seed: of the sampler.
    """

    space: dict[
        str,
        Annotated[
            Annotated[Range, Tag("a range")] | Annotated[tuple[bool | int | float | str, ...], Tag("a list")],
            Discriminator(lambda value: "a range" if isinstance(value, dict | Range) else "a list"),
        ],
    ] = Field(min_length=1)
    trials: int = Field(default=30, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    metrics: tuple[str, ...] = Field(default=(), max_length=2)
    parallel: int = Field(default=1, ge=1)
    prune: bool = True
    seed: int = Field(default=0, ge=0)


class Recipe(_Block):
    """A validated recipe. Make one with `Recipe.load` or `Recipe.parse`.

    Attributes:
        exclude: parts of the names of tensors that are copied from the base as they are; `*` stands for anything.
    """

    merge_method: str
    base_model: ModelName | None = None
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: ModelName | None = None
    tokenizer: Tokenizer | None = None
    exclude: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int = Field(default=0, ge=0)
    lewis: Lewis | None = None
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
        path = Path(path).expanduser()
        try:
            text = path.read_text()
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from error
        return cls.parse(text, root=path.resolve().parent, name=path.stem, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, root: Path, name: str = "recipe", overrides: Sequence[str] = ()) -> "Recipe":
        """`load` from the YAML text itself; `root` is where its relative paths start."""
        try:
            data = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{name}: expected a mapping with `merge_method` and `models`, got {type(data).__name__}")
        for override in overrides:
            _override(data, override)
        load_plugins()
        problems = cross_check(data)
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            problems = [*describe(error, cls), *problems]
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)))
        recipe._root, recipe._name = root, name
        recipe._text = text if not overrides else yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        return recipe

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models that are merged: all but the base, which a recipe may list too, if the base has a role of its own.

        Where it has none (linear, karcher), it is one of them, listed or not (as mergekit).
        """
        if not find(self.merge_method).base_is_a_model:
            return tuple(entry for entry in self.models if entry.model != self.base_model)
        if self.base_model is None or self.base_model in {entry.model for entry in self.models}:
            return self.models
        return (*self.models, ModelEntry(model=self.base_model))

    @property
    def vocabulary(self) -> Tokenizer | None:
        """Whose tokens the result has; None: all models must have the base's."""
        return Tokenizer(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    def calibration_of(self, expert: ModelEntry) -> str:
        """The name of the calibration set that `expert` is measured on."""
        assert self.lewis is not None
        return expert.calibration or next(iter(self.lewis.calibrations))

    def value(self, parameter: Parameter, expert: ModelEntry | None, tensor: str, position: float) -> Any:
        """One parameter's value for one tensor, by mergekit's precedence: the model's own, the top level, the default.

        Args:
            parameter: as the method declares it.
            expert: whose value, for a parameter of each expert.
            tensor: the tensor's name, which filters are searched in.
            position: depth of its layer in [0, 1], which gradients are read at; 0 outside the layers.

        Raises:
            RecipeError: if no filter of a parameter that must be given matches the tensor.
        """
        sources = [expert.parameters] if parameter.per_expert and expert is not None else []
        for source in [*sources, self.parameters]:
            if parameter.name in source:
                found = value_at(source[parameter.name], tensor, position, parameter.parse)
                if found is not None:
                    return found
        if parameter.required:
            raise RecipeError(
                f"parameters.{parameter.name}: no filter matches {tensor!r}; end the list with a {{value: ...}} for all"
            )
        return parameter.default

    def excludes(self, tensor: str) -> bool:
        """Whether a tensor is to be copied from the base."""
        return any(_matches(pattern, tensor) for pattern in self.exclude)

    def check_filters(self, tensors: Iterable[str]) -> None:
        """Check that every filter, and every pattern of `exclude`, matches a tensor.

        Raises:
            RecipeError: naming each that matches none, and the nearest module.
        """
        names = list(tensors)
        modules = {name.rsplit(".", 1)[0] for name in names} | {re.sub(r"^.*\.\d+\.", "", n) for n in names}
        problems = [
            f"exclude[{i}]: {pattern!r} matches no tensor{nearest(pattern, modules)}"
            for i, pattern in enumerate(self.exclude)
            if not any(_matches(pattern, name) for name in names)
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
        return [*own, ("parameters", self.parameters)]

    @property
    def guided(self) -> bool:
        """Whether importance decides the densities."""
        return self.lewis is not None and self.lewis.density.strategy != "uniform"

    @property
    def measures(self) -> bool:
        """Whether a merge needs the importance pass of its experts."""
        blind = self.lewis is None or self.lewis.density.strategy in ("uniform", "depth_gradient")
        return not blind or (self.lewis is not None and self.lewis.prune_by == "activation")

    @property
    def compares_norms(self) -> bool:
        """Whether densities are made of the difference of norms, and so of the base's too."""
        block = self.lewis
        return block is not None and (block.density.strategy, block.importance.metric) == ("lewis", "norm_difference")

    @property
    def measures_base(self) -> bool:
        """Whether a merge needs the importance pass of the base."""
        return self.compares_norms or (self.lewis is not None and self.lewis.aim is not None)

    @property
    def wants_uniform(self) -> bool:
        """Whether the uniform baseline, with the same mean densities, is to be merged and scored too."""
        return self.guided and self.evaluate is not None and "uniform" in self.evaluate.baselines

    @property
    def scores_base(self) -> bool:
        """Whether the base is scored: as a baseline, or since the first champion has to beat it."""
        gated = self.register_as is not None and self.register_as.gate is not None
        return (
            self.base_model is not None and self.evaluate is not None and ("base" in self.evaluate.baselines or gated)
        )

    @property
    def scores_experts(self) -> bool:
        """Whether the experts are scored: as baselines, or since the best is what a gate has where there is no base."""
        gated = self.register_as is not None and self.register_as.gate is not None
        return self.evaluate is not None and ("experts" in self.evaluate.baselines or (gated and not self.base_model))

    @property
    def label(self) -> str:
        """What to call the merged model in tables."""
        return "lewis" if self.guided else "merged"

    @property
    def blocks(self) -> str:
        """What decides the merged weights, as canonical JSON: without those of what is done with them."""
        return self.model_dump_json(exclude={"evaluate", "register_as", "publish", "search"})


def excluded(recipe: Recipe, names: Iterable[str], tied: Mapping[str, str]) -> frozenset[str]:
    """The tensors of the base that a recipe excludes.

    Args:
        names: of the base's stored tensors.
        tied: name -> the stored tensor that it is tied to. A pattern that matches such a name excludes that tensor.
    """
    if not recipe.exclude:
        return frozenset()
    return frozenset(tied.get(name, name) for name in [*names, *tied] if recipe.excludes(name))


def _matches(pattern: str, tensor: str) -> bool:
    return fnmatch.fnmatchcase(tensor, f"*{pattern}*")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def value_of(recipe: Recipe, path: str) -> Any:
    """What a recipe says, or leaves to be understood, at a YAML path as in `--set`; None if that is nothing."""
    given = yaml.load(recipe.text, Loader=_StrictLoader)
    place: Any
    for place in (given, recipe.model_dump(mode="json", by_alias=True)):
        for key in _keys(path):
            found = key in place if isinstance(place, dict) else isinstance(key, int) and 0 <= key < len(place or ())
            place = place[key] if found else None
        if place is not None:
            return place
    name = path.rpartition(".")[2]
    parameter = find(recipe.merge_method).parameters.get(name) if "parameters." in path else None
    return parameter.default if parameter and not parameter.required else None


def _keys(path: str) -> list[str | int]:
    return [int(key) if key.isdigit() else key for key in re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")]


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = _keys(path)
    if not equals or "" in keys:
        raise InputError(f"--set {override}: expected key.path=value, for example lewis.density.max=0.7")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    place: Any = data
    for i, key in enumerate(keys):
        if isinstance(place, list) != isinstance(key, int) or (isinstance(key, int) and key >= len(place)):
            raise InputError(f"--set {override}: there is no {'.'.join(map(str, keys[: i + 1]))} in the recipe")
        if i == len(keys) - 1:
            place[key] = value
        else:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict | list):
                raise InputError(f"--set {override}: {'.'.join(map(str, keys[: i + 1]))} is {place!r}, not a block")
