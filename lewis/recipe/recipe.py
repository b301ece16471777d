"""The validated recipe, and the properties by which other packages learn what a run of it needs."""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidationError
from pydantic_core import to_json

from lewis.allocators import ALLOCATORS
from lewis.errors import InputError, RecipeError, nearest
from lewis.methods import METHODS, find
from lewis.recipe import dialect, lm_eval_config, yaml_text
from lewis.recipe.checks import cross_check, other_spellings
from lewis.recipe.config import MergeConfig
from lewis.recipe.schema import (
    GUIDES,
    NAME,
    NOT_BLANK,
    RECOMMENDED,
    REPO,
    Evaluate,
    Gate,
    Inspect,
    Lewis,
    ModelEntry,
    Publish,
    Register,
    Search,
)
from lewis.recipe.serve import TARGETS, URL, Serve
from lewis.recipe.slices import listed_models, of_listed

MAX_PROBLEMS = 50  # problems of one recipe that an error lists


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
        named = dialect.with_names(data)
        problems = cross_check(named)
        try:
            sliced = {"models": listed_models(named)} if data.get("slices") else {}
            recipe = cls.model_validate({**named, **sliced})
            listed = {f"models[{i}].model": entry.model for i, entry in enumerate(recipe.models)}
            if sliced:
                listed = {of_listed(named, path): name for path, name in listed.items()}
            problems += other_spellings(listed, recipe.base_model, root)
        except ValidationError as error:
            problems = [*describe(error, cls), *problems]
        if problems:
            problems = list(dict.fromkeys(problems))
            more = [f"and {len(problems) - MAX_PROBLEMS} problems more"] if len(problems) > MAX_PROBLEMS else []
            raise RecipeError([*problems[:MAX_PROBLEMS], *more])
        recipe._root, recipe._name = root, name
        recipe._text = text if not overrides else yaml_text.write(data)
        return recipe

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
        given = self.lewis.model_fields_set.intersection(GUIDES)
        guides = self.anchor is not None and any(getattr(self.lewis, key) is not None for key in given)
        return self.lewis if guides else None

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
        return self.measures or self.measures_base or self.fits

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
    for problem in error.errors():
        location, kind, given = problem["loc"], problem["type"], problem["input"]
        if kind == "too_short" and problem["ctx"]["actual_length"] < len(given):
            continue  # pydantic counts only the valid items; the invalid ones have problems of their own
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
            lines.append(f"{where}: {str(problem['msg']).removeprefix('Value error, ')}")
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
