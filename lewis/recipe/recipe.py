"""The validated recipe, and the properties by which other packages learn what a run of it needs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator
from pydantic_core import to_json

from lewis.allocators import ALLOCATORS
from lewis.errors import InputError, nearest
from lewis.methods import METHODS, find
from lewis.recipe import checks, dialect, lm_eval_config, yaml_text
from lewis.recipe.block import Problems
from lewis.recipe.config import MergeConfig
from lewis.recipe.problems import validated
from lewis.recipe.schema import (
    RECOMMENDED,
    Evaluate,
    Gate,
    Inspect,
    Lewis,
    ModelEntry,
    Publish,
    Register,
    Search,
)
from lewis.recipe.serve import Serve


class Recipe(MergeConfig):
    """A validated recipe: a `MergeConfig` and the blocks around it. Make one with `Recipe.load` or `Recipe.parse`."""

    lewis: Lewis | None = None
    inspect: Inspect = Inspect()
    evaluate: Evaluate | None = None
    register_as: Register | None = Field(default=None, alias="register")
    publish: Publish | None = None
    serve: Serve = ()
    search: Search | None = None
    _name: str = PrivateAttr(default="recipe")
    _text: str = PrivateAttr(default="")

    @property
    def config(self) -> MergeConfig:
        """The part of the recipe that defines the merge, without the other blocks."""
        made = MergeConfig.model_construct(**{name: getattr(self, name) for name in MergeConfig.model_fields})
        made._root = self._root
        return made

    @property
    def name(self) -> str:
        """The recipe file's name without its ending."""
        return self._name

    @property
    def text(self) -> str:
        """The recipe as YAML, overrides included."""
        return self._text

    @property
    def public_text(self) -> str:
        """`text` without the block `serve`, which names private machines; for the model card and published files."""
        return yaml_text.without(self._text, "serve") if self.serve else self._text

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read and check a recipe from its file.

        Args:
            path: a YAML file.
            overrides: settings of the form `key.path=value`, the value in YAML; applied before the check.

        Raises:
            RecipeError: with every problem found, each beginning with its YAML path.
        """
        path, text = yaml_text.read_file(path)
        return cls.parse(text, root=path.resolve().parent, name=path.stem, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, root: str | Path, name: str = "recipe", overrides: Sequence[str] = ()) -> "Recipe":
        """Read and check a recipe from its text.

        Args:
            text: YAML.
            root: the folder that relative paths in the recipe start from.
            name: the name of the recipe.
            overrides: as for `load`.

        Raises:
            InputError: if an argument is of another type, such as a dict.
            RecipeError: with every problem found, each beginning with its YAML path.
        """
        if not isinstance(text, str):
            raise InputError(
                f"text: expected YAML or JSON text, got {type(text).__name__}; json.dumps makes it of a dict"
            )
        if not isinstance(root, str | PathLike):
            raise InputError(f"root: expected the path of a folder, got {root!r}; give one, such as '.'")
        if isinstance(overrides, str) or not isinstance(overrides, Iterable):
            right = [overrides] if isinstance(overrides, str) else []
            raise InputError(f"overrides: expected a list of settings, got {overrides!r}; give {right!r}")
        root, data = Path(root).absolute(), yaml_text.read(text, name)
        for setting in overrides:
            yaml_text.override(data, setting)
        for table in (METHODS, ALLOCATORS):
            table.load()
        if data.get("merge_method") == "recommended":
            data["merge_method"] = RECOMMENDED
        data = lm_eval_config.with_config(dialect.as_recipe(data), root)
        recipe = validated(cls, data, root=root)
        recipe._root, recipe._name = root, name
        recipe._text = text if not overrides else yaml_text.write(data)
        return recipe

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, name: str, info: ValidationInfo) -> str:
        if name not in METHODS and "merge_method" not in (info.context or {}).get("wrong", ()):
            raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}")
        return name

    @model_validator(mode="after")
    def _check_blocks(self, info: ValidationInfo) -> Self:
        """Check what spans several blocks. The context has the recipe's folder, and the keys whose values are wrong."""
        context = info.context or {}
        wrong, root = context.get("wrong", frozenset()), context.get("root", Path.cwd())
        release = self.evaluate, self.register_as, self.publish, self.serve
        found: list[tuple[set[str], Iterator[str]]] = [  # keys without which a check finds too much, and its problems
            (set(), checks.of_models(self)),
            ({"parameters"}, checks.of_parameters(self, self.lewis)),
            (set(), checks.of_anchor(self, self.lewis)),
            ({"lewis", "anchor"}, checks.of_lewis(self, self.lewis)),
            ({"lewis"}, checks.of_calibrations(self, self.lewis)),
            (set(), checks.of_tokenizer(self)),
            ({"output", "evaluate", "register"}, checks.of_release(self, *release)),
            (set(), checks.of_spellings(self, root)),
        ]
        if problems := [problem for reads, each in found if reads.isdisjoint(wrong) for problem in each]:
            raise Problems(problems)
        return self

    def calibration_of(self, expert: ModelEntry) -> str:
        """The name of the calibration set that `expert` is measured on."""
        assert self.lewis is not None
        return expert.calibration or next(iter(self.lewis.calibrations))

    @property
    def needs_grams(self) -> bool:
        """As `MergeConfig.needs_grams`, but False where the importance pass does not measure the rows of the fit.

        There are none without calibration sets; and where some are held back, the merge measures the others.
        """
        return super().needs_grams and bool(self.lewis and self.lewis.calibrations) and not self.holds_back

    @property
    def holds_back(self) -> bool:
        """Whether a part of the calibration rows is held back to judge the fit."""
        if self.lewis is None or not self.fits:
            return False
        asked = self.lewis.hold_back
        return find(self.merge_method).fits == "forward" if asked is None else asked

    @property
    def allocator(self) -> Lewis | None:
        """The `lewis` block, if it decides densities: of the merge, or of the anchor if the method fits; else None."""
        if self.lewis is None or not self.fits:
            return self.lewis
        return self.lewis if self.anchor is not None and self.lewis.guides else None

    @property
    def guided(self) -> bool:
        """Whether an allocator decides the densities that can give layers different ones (`Allocator.guides`)."""
        return self.allocator is not None and self.allocator.density.allocator.guides

    @property
    def measures(self) -> bool:
        """Whether the merge needs the importance pass of the experts."""
        block = self.allocator
        by_activations = block is not None and (block.evidence != "nothing" or block.prune_by == "activation")
        return self.needs_grams or by_activations

    @property
    def runs_models(self) -> bool:
        """Whether a model is run, to measure it or to fit the merge to it. Uniform densities need none."""
        return self.fits or (self.allocator is not None and self.allocator.runs_models)

    @property
    def needs_network(self) -> bool:
        """Whether a run needs the models' networks: to measure the models, to fit the merge, or to score it."""
        return self.runs_models or self.evaluate is not None

    @property
    def measures_base(self) -> bool:
        """Whether the merge needs the importance pass of the base: for the difference of norms, or for `aim`."""
        block = self.allocator
        return block is not None and (block.evidence == "norm_difference" or block.aim is not None)

    @property
    def wants_uniform(self) -> bool:
        """Whether a second merge is made and scored as a baseline, with the mean densities in all layers."""
        return self.guided and self.evaluate is not None and "uniform" in self.evaluate.baselines

    @property
    def gate(self) -> Gate | None:
        """The rules of promotion; None: every version becomes the champion, or nothing is registered."""
        return self.register_as.gate if self.register_as else None

    @property
    def gate_metric(self) -> str | None:
        """The name of the score that decides about promotion, `task/metric,filter`; None if there is no gate."""
        return self.gate.metric if self.gate else None

    @property
    def score_weights(self) -> Mapping[str, float]:
        """The weights of the score `weighted/mean,none`; empty: there is no such score."""
        return self.evaluate.weights if self.evaluate else {}

    @property
    def scores_base(self) -> bool:
        """Whether the base is scored: as a baseline, or because the first champion has to beat it."""
        if self.base_model is None or self.evaluate is None:
            return False
        return "base" in self.evaluate.baselines or self.gate is not None

    @property
    def scores_experts(self) -> bool:
        """Whether the experts are scored: as baselines, or because without a base the gate compares with the best."""
        if self.evaluate is None:
            return False
        return "experts" in self.evaluate.baselines or (self.gate is not None and not self.base_model)

    @property
    def blocks(self) -> str:
        """The blocks that decide the merged weights, as canonical JSON.

        `inspect`, `evaluate` and the blocks after it are left out; `output` is included if the merge writes an adapter.
        """
        left_out = {"inspect", "evaluate", "register_as", "publish", "serve", "search"}
        # so that results are found that were cached before these keys existed
        left_out |= {key for key in ("anchor", "slices", "chat_template") if getattr(self, key) is None}
        left_out |= {"output"} if self.output.kind == "full" else set()
        found = self.model_dump(mode="json", exclude=left_out)
        found |= {"output": found.pop("output")} if "output" in found else {}  # last: digests depend on the order
        return to_json(found).decode()
