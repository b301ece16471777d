"""The graph of a recipe: which steps it needs, in which order, and what each is given.

    resolve, preflight                  no nodes: pin each model to a commit; do headers and configs fit together?
      └─ download [base, experts]
           └─ inspect                   can it be merged, is there room?
                ├─ diagnose             do the weights belong together? an error stops the run before the merge
                └─ calibrate [sets]     before `inspect`, if the method fits
                     └─ continue [sets] the expert writes the answers, where the recipe says so
                     └─ measure [base, experts]
                          └─ allocate
                               ├─ merge experts
                               └─ merge uniform
                                    └─ evaluate [base, experts, uniform, champion, merged] on [tasks]
                                         └─ gate, register, promote, publish      no nodes

Tasks that are no nodes are called by the code that walks the graph, which gives their results to the nodes. Steps that
a recipe does not need are left out: a plain merge has neither sets nor densities, a method that fits in forward order
has sets but measures nothing. This module is the only one that reads a recipe for its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from lewis.allocation.step import AllocationInput, ExpertInput
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scored import MERGED
from lewis.evaluation.step import furthest_look
from lewis.importance.continuations import ContinueInput
from lewis.importance.step import CalibrationEntry, CalibrationInput, MeasureInput
from lewis.inspection.step import InspectionInput, InspectionSettings
from lewis.merging.calibration_rows import shared_set_warning
from lewis.merging.settings import stored_dtype
from lewis.merging.step import MergeInput
from lewis.methods import find
from lewis.models.names import short_or_whole
from lewis.models.source import short_name, short_names
from lewis.recipe.recipe import Recipe
from lewis.steps import table
from lewis.steps.step import Step
from lewis.steps.table import CheckInput, ScoreInput

Results = Mapping[str, Any]
"""Name of a node, or of a task outside of the graph -> its result."""

CHAMPION = "find champion"  # the name under which the caller gives the champion's files, or None
MARK = "find mark"  # the name under which the caller gives the files of the gate's mark, or None
LOOK = "look"  # the name under which the caller says how many documents are scored; left out: all
PREFLIGHT = "preflight"


@dataclass(frozen=True)
class Node:
    """One step of a recipe.

    Attributes:
        name: what is done to what, such as `measure org/math on gsm8k`; the key of its result.
        step: its row in the table.
        given: makes the step's input from the results that it needs. A result that is missing is left out of the input.
        needs: names of the nodes whose results it needs, or that must have passed before.
        after: names of further nodes that it comes after, if they are done at all.
        when: given the results that it needs, whether the step is done; None: always.
        asset: kind and name of the asset that it makes, for Prefect's lineage; None if it makes none.
        made_of: kinds and names of the assets that this one is made of.
        model: short name of the one model that it is done to; empty if it is done to none, or several.
    """

    name: str
    step: Step[Any, Any]
    given: Callable[[Results], Any]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    when: Callable[[Results], bool] | None = None
    asset: tuple[str, str] | None = None
    made_of: tuple[tuple[str, str], ...] = ()
    model: str = ""

    @property
    def label(self) -> str:
        """The name of its task in Prefect, and of its line in a plan: short, such as `measure math`, and unique."""
        return f"{self.step.name} {self.model}" if self.model else self.name


class Graph:
    """The nodes of a recipe, each after those that it needs."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        """Put nodes in order.

        Args:
            nodes: each after those that it needs. Of two with one name the first counts.
        """
        self._nodes: dict[str, Node] = {}
        for node in nodes:
            self._nodes.setdefault(node.name, node)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def of(self, step: Step[Any, Any]) -> list[Node]:
        """The nodes of a step."""
        return [node for node in self if node.step is step]

    def towards(self, *names: str, known: Collection[str] = ()) -> Graph:
        """Return the graph of the named nodes and all nodes that they need.

        Args:
            names: of nodes.
            known: nodes whose results exist already: these nodes, and nodes that only they need, are left out.
        """
        wanted, open_ = set[str](), [name for name in names if name not in known]
        while open_:
            name = open_.pop()
            if name in self._nodes and name not in wanted:
                wanted.add(name)
                open_ += [each for each in self._nodes[name].needs if each not in known]
        return Graph(node for node in self if node.name in wanted)

    def edges(self, name: str) -> list[str]:
        """The edges to draw into a node: from the nodes that it waits for, except those that another of them needs."""
        direct = [*self._nodes[name].needs, *self._nodes[name].after]
        behind = {each for other in direct for each in self._before(other)}
        return [each for each in dict.fromkeys(direct) if each not in behind]

    def _before(self, name: str) -> set[str]:
        """All nodes that must be done before a node."""
        if name not in self._nodes:
            return set()
        direct = {*self._nodes[name].needs, *self._nodes[name].after}
        return direct.union(*(self._before(each) for each in direct))


def graph(recipe: Recipe) -> Graph:
    """Return the steps of a recipe as a graph, in the order of the diagram at the top of this module.

    The caller gives the results of tasks outside of the graph: `resolve REF` -> the pinned `Source` of each model, and
    for the scores of the champion `find champion` -> its `ModelFiles`, or None.
    """
    first, then = [_calibrations, _checks] if recipe.fits else [_checks, _calibrations]
    parts = (_downloads, first, then, _continuations, _measurements, _merges, _scores)
    return Graph(node for part in parts for node in part(recipe))


def resolved(ref: str) -> str:
    """The name under which the caller gives the pinned model of a reference."""
    return f"resolve {ref}"


def short_refs(recipe: Recipe) -> dict[str, str]:
    """Reference of the base and each expert -> its short name, or the whole reference where that is ambiguous."""
    refs = _refs(recipe)
    return dict(zip(refs, short_or_whole([short_name(ref, recipe.root) for ref in refs], refs), strict=True))


def _downloads(recipe: Recipe) -> Iterator[Node]:
    for ref, short in short_refs(recipe).items():
        name, source = f"download {ref}", resolved(ref)
        yield Node(name, table.DOWNLOAD, itemgetter(source), (source,), after=(PREFLIGHT,), model=short)


def _checks(recipe: Recipe) -> Iterator[Node]:
    downloads = tuple(f"download {ref}" for ref in _refs(recipe))
    merge, settings, has_base = _merging(recipe), inspection_settings(recipe), recipe.base_model is not None
    covers, runs = recipe.lewis is not None and has_base, recipe.runs_models
    copies, warning = 1 + recipe.wants_uniform, warning_of_shared_set(recipe)

    def to_check(results: Results) -> CheckInput:
        return CheckInput(merge(results), copies, covers, runs, warning)

    def to_inspect(results: Results) -> InspectionInput:
        models = tuple(results[name] for name in downloads)
        base, experts = (models[0], models[1:]) if has_base else (None, models)
        return InspectionInput(base, experts, settings)

    fitted = tuple(f"calibrate {name}" for name in dict.fromkeys(_sets_of_fit(recipe).values()))  # prompts suffice
    yield Node("inspect", table.CHECK, to_check, (*downloads, *fitted))
    if recipe.inspect.on != "off":
        yield Node("diagnose", table.DIAGNOSE, to_inspect, downloads, after=("inspect",))


def _calibrations(recipe: Recipe) -> Iterator[Node]:
    if recipe.lewis is None or recipe.base_model is None:
        return
    sets, root, of_base = recipe.lewis.calibrations, recipe.root, f"download {recipe.base_model}"
    # The inspection of a method that fits reads the calibration rows, so they come before it.
    needs = (of_base,) if recipe.fits else (of_base, "inspect")
    for name in _sets(recipe):

        def to_calibrate(results: Results, name: str = name) -> CalibrationInput:
            return CalibrationInput(name, sets[name], root, results[of_base])

        yield Node(f"calibrate {name}", table.CALIBRATE, to_calibrate, needs)


def _continuations(recipe: Recipe) -> Iterator[Node]:
    for name in _sets(recipe):
        if recipe.lewis and recipe.lewis.calibrations[name].continues:
            [expert] = [each.model for each in recipe.experts if recipe.calibration_of(each) == name]
            yield _continuation(recipe, name, expert)


def _continuation(recipe: Recipe, name: str, expert: str) -> Node:
    assert recipe.lewis is not None
    block, prompts, model = recipe.lewis.calibrations[name], f"calibrate {name}", f"download {expert}"
    base = f"download {recipe.base_model}"

    def to_continue(results: Results) -> ContinueInput:
        length, seed, weight = block.max_tokens, block.seed, block.prompt_weight
        count = block.continues or 0
        return ContinueInput(results[prompts], results[model], count, length, seed, weight, results[base])

    needs, short = (prompts, base, model, "inspect"), short_refs(recipe)[expert]
    return Node(f"continue {name}", table.CONTINUE, to_continue, needs, model=short)


def _sets(recipe: Recipe) -> list[str]:
    """Names of the calibration sets that are used, each once; none without a base, whose tokenizer makes them."""
    if recipe.lewis is None or recipe.base_model is None:
        return []
    measured = (name for chosen in _passes(recipe).values() for name in chosen)
    return list(dict.fromkeys([*measured, *_sets_of_fit(recipe).values()]))


def _rows(recipe: Recipe, name: str) -> str:
    """Name of the node whose result is the rows of a calibration set."""
    assert recipe.lewis is not None
    return f"{'continue' if recipe.lewis.calibrations[name].continues else 'calibrate'} {name}"


def _measurements(recipe: Recipe) -> Iterator[Node]:
    if recipe.lewis is None or recipe.base_model is None:
        return
    grams, experts, block = recipe.needs_grams, _expert_refs(recipe), recipe.lewis.importance
    short = short_refs(recipe)
    settings = block.model_copy(update={"metric": type(block)().metric})  # no pass depends on it
    for ref, chosen in _passes(recipe).items():

        def to_measure(results: Results, ref: str = ref, chosen: Sequence[str] = chosen) -> MeasureInput:
            own = tuple(results[_rows(recipe, name)] for name in chosen)
            return MeasureInput(results[f"download {ref}"], own, settings, grams and ref in experts)

        needs = (f"download {ref}", "inspect", *(_rows(recipe, name) for name in chosen))
        assets = ("importance", ref), (("model", ref),)
        yield Node(_measured(ref, chosen), table.MEASURE, to_measure, needs, (), None, *assets, model=short[ref])
    if recipe.allocator is not None:
        downloads, measured = tuple(f"download {ref}" for ref in _refs(recipe)), _all_measured(recipe)
        yield Node("allocate", table.ALLOCATE, _allocation(recipe), (*downloads, "inspect", *measured))


def _allocation(recipe: Recipe) -> Callable[[Results], AllocationInput]:
    block, config, runs, names = recipe.lewis, recipe.config, recipe.runs_models, _all_measured(recipe)
    assert block is not None
    sets = {each.model: recipe.calibration_of(each) if recipe.measures else None for each in recipe.experts}

    def given(results: Results) -> AllocationInput:
        return AllocationInput(
            density=block.density,
            metric=block.importance.metric,
            prune_by=block.prune_by,
            aim=block.aim is not None,
            config=config,
            base=results[f"download {config.base_model}"],
            experts=tuple(ExpertInput(ref, results[f"download {ref}"], chosen) for ref, chosen in sets.items()),
            measured=tuple(entry for name in names for entry in results[name]),
            runs_models=runs,
        )

    return given


def _merges(recipe: Recipe) -> Iterator[Node]:
    needs = [*(f"download {ref}" for ref in _refs(recipe)), "inspect"]
    guided = recipe.allocator is not None and recipe.base_model is not None
    needs += ["allocate"] if guided else []
    needs += [_rows(recipe, name) for name in _sets_of_fit(recipe).values()]
    needs += _all_measured(recipe) if recipe.needs_grams else []
    name = recipe.register_as.model if recipe.register_as else recipe.name
    made_of = tuple(("model", ref) for ref in _refs(recipe)) + tuple(("importance", ref) for ref in _passes(recipe))
    for which in ("experts", *(("uniform",) if recipe.wants_uniform else ())):
        asset = ("merged", name if which == "experts" else f"{name} {which}")
        given = _merging(recipe, which)
        after = ("diagnose",) if recipe.inspect.on == "error" else ()
        yield Node(f"merge {which}", table.MERGE, given, tuple(dict.fromkeys(needs)), after, None, asset, made_of)


def _merging(recipe: Recipe, which: str = "experts") -> Callable[[Results], MergeInput]:
    """Return the function that makes a merge's input; densities and sets that the results lack are left out of it."""
    config, text, sets = recipe.config, recipe.public_text, _sets_of_fit(recipe)
    block = recipe.allocator if recipe.base_model else None
    aim = recipe.lewis.aim if recipe.lewis else None
    measured, uncovered = recipe.measures, block.density.uncovered if block else None
    without_rows = recipe.fits and recipe.lewis is None

    def given(results: Results) -> MergeInput:
        found = {ref: _filled(recipe, name, results) for ref, name in sets.items()}
        known = {ref: each for ref, each in found.items() if each is not None}
        return MergeInput(
            config,
            results[f"download {config.base_model}"] if config.base_model else None,
            tuple(results[f"download {entry.model}"] for entry in config.experts),
            text,
            results.get("allocate"),
            which,
            None if without_rows else known if len(known) == len(found) else {},
            aim.omega if aim else None,
            measured,
            uncovered,
            recipe.holds_back,
            recipe.lewis.refine if recipe.lewis else None,
        )

    return given


def _filled(recipe: Recipe, name: str, results: Results) -> CalibrationEntry | None:
    """The rows of a calibration set for a merge; None if they are not known yet.

    Before an expert has continued them, prompts stand for its rows: enough to check a merge, and to time it.
    """
    assert recipe.lewis is not None
    written: CalibrationEntry | None = results.get(f"continue {name}")
    if written is None:
        return results.get(f"calibrate {name}")
    # The recipe says it, since a result that Prefect keeps of an older version does not.
    return written.model_copy(update={"continues": recipe.lewis.calibrations[name].continues})


def _scores(recipe: Recipe) -> Iterator[Node]:
    if recipe.evaluate is None:
        return
    settings = EvalSettings.of(recipe.evaluate, recipe.root).by_task()
    names, drawn = evaluations(recipe), recipe.evaluate.documents == "by_release"
    for label, source in labels(recipe).items():

        def differs(results: Results, source: str = source) -> bool:
            known = {results["merge experts"].key}
            if source == MARK and results.get(CHAMPION) is not None:
                known.add(results[CHAMPION].key)
            return results.get(source) is not None and results[source].key not in known

        last = source if source == "merge uniform" else "merge experts"
        when = differs if source in (CHAMPION, MARK) else None
        needs = (source, *(("merge experts",) if when or drawn else ()))
        for name, task in zip(names[label], settings, strict=True):

            def to_score(
                results: Results, label: str = label, source: str = source, task: EvalSettings = task
            ) -> ScoreInput:
                model, seed = results[source], results["merge experts"].key if drawn else ""
                return ScoreInput(
                    label, model.key, model.files(label), replace(task, look=results.get(LOOK), seed=seed)
                )

            yield Node(name, table.EVALUATE, to_score, needs, after=(last,), when=when)


def look_to_show(recipe: Recipe, merged: str, champion: str | None) -> int | None:
    """The number of documents per task that the shown scores of a merged model are on, if it was judged; None: all.

    Args:
        recipe: with an `evaluate` block.
        merged: the model's digest.
        champion: the digest of the champion, which is scored on all documents by default.
    """
    assert recipe.evaluate is not None
    if merged == champion and recipe.evaluate.full_scores == "promoted":
        return None
    return furthest_look(MERGED, merged, EvalSettings.of(recipe.evaluate, recipe.root).drawn_by(merged))


def evaluations(recipe: Recipe) -> dict[str, list[str]]:
    """Label of each model that is scored -> the nodes of its scores, one for each task of the recipe."""
    tasks = list(dict.fromkeys(recipe.evaluate.tasks)) if recipe.evaluate else []
    short = short_or_whole([Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks], tasks)
    return {label: [f"{table.EVALUATE.name} {label} {task}" for task in short] for label in labels(recipe)}


def labels(recipe: Recipe) -> dict[str, str]:
    """Label of each scored model -> the node, or task outside of the graph, that gives it; the merged model is last."""
    found: dict[str, str] = {}
    if recipe.scores_base:
        found["base"] = f"download {recipe.base_model}"
    if recipe.scores_experts:
        refs = [entry.model for entry in recipe.experts]
        pairs = zip(short_names(refs, recipe.root), refs, strict=True)
        found |= {label: f"download {ref}" for label, ref in pairs if ref != recipe.base_model}
    if recipe.wants_uniform:
        found["uniform"] = "merge uniform"
    if recipe.register_as:
        found["champion"] = CHAMPION
        if recipe.evaluate and recipe.evaluate.documents == "by_release":
            found["mark"] = MARK  # which was never scored on these documents
    return {**found, MERGED: "merge experts"}


def inspection_settings(recipe: Recipe) -> InspectionSettings:
    """Return the settings of a recipe's merge that an inspection depends on."""
    return InspectionSettings(
        base_is_a_model=find(recipe.merge_method).base_is_a_model,
        exclude=recipe.exclude,
        by_token=recipe.vocabulary is not None,
        sliced=bool(recipe.slices),
        dtype=stored_dtype(recipe),
        root=recipe.root,
        stops=recipe.inspect.on == "error",
    )


def warning_of_shared_set(recipe: Recipe) -> str:
    """A warning about the calibration sets of a fit; empty if there is none."""
    sets = recipe.lewis.calibrations if recipe.lewis else {}
    if not recipe.fits or not sets:
        return ""
    return shared_set_warning(next(iter(sets)), {entry.model: entry.calibration for entry in recipe.experts})


def _refs(recipe: Recipe) -> list[str]:
    """References of the base and the experts, each once."""
    return list(dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *_expert_refs(recipe)]))


def _expert_refs(recipe: Recipe) -> list[str]:
    return [entry.model for entry in recipe.experts]


def _passes(recipe: Recipe) -> dict[str, list[str]]:
    """Model -> the calibration sets that it is measured on, in one pass.

    The base is measured on every set that an expert has, for the difference of norms, and for `aim`; the experts are
    measured if the allocator or `prune_by: activation` uses activations, or the method fits to statistics.
    """
    found: dict[str, list[str]] = {}
    if recipe.measures_base:
        found[str(recipe.base_model)] = list(dict.fromkeys(map(recipe.calibration_of, recipe.experts)))
    for entry in recipe.experts if recipe.measures else ():
        sets = found.setdefault(entry.model, [])
        sets += [name for name in (recipe.calibration_of(entry),) if name not in sets]
    return found


def _measured(ref: str, sets: Sequence[str]) -> str:
    return f"measure {ref} on {', '.join(sets)}"


def _all_measured(recipe: Recipe) -> tuple[str, ...]:
    return tuple(_measured(ref, sets) for ref, sets in _passes(recipe).items())


def _sets_of_fit(recipe: Recipe) -> dict[str, str]:
    """Expert -> the calibration set that it is fitted on; empty if the method fits nothing."""
    if not recipe.fits or recipe.lewis is None or not recipe.lewis.calibrations:
        return {}
    return {entry.model: recipe.calibration_of(entry) for entry in recipe.experts}
