"""Walk a graph without doing the work: what a run would do, and what that takes.

Only configs and tokenizers are downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import LewisError, TransientError
from lewis.evaluation.outlook import outlook
from lewis.evaluation.step import find_score, scoring_devices
from lewis.importance.coverage import covered_tensors
from lewis.inspection.kinds import Finding
from lewis.inspection.step import before_download
from lewis.memory import mapped_bytes
from lewis.merging.adapter import factor_bytes
from lewis.merging.forecast import without_models
from lewis.merging.settings import stored_dtype
from lewis.methods import find
from lewis.models.compatible import preflight, result_headers
from lewis.models.dtypes import DTYPES
from lewis.models.files.safetensors_file import Headers
from lewis.models.hub import repository
from lewis.models.lora.expert import LoraExpert
from lewis.models.network.module_tree import Layer
from lewis.models.source import ModelFiles, Source, commits_of, pin_all
from lewis.progress import silent
from lewis.recipe.recipe import Recipe
from lewis.redact import redacted
from lewis.registry import promotion, tracking, versions
from lewis.registry.versions import Champion
from lewis.settings import STORE_MERGED, size_text
from lewis.steps.graph import (
    CHAMPION,
    LOOK,
    MARK,
    Graph,
    Node,
    graph,
    inspection_settings,
    labels,
    look_to_show,
    warning_of_shared_set,
)
from lewis.steps.run import check_scored, check_tasks, pinned
from lewis.steps.step import Cost, Step
from lewis.steps.table import CALIBRATE, CHECK, CONTINUE, DOWNLOAD, EVALUATE, MEASURE, MERGE, ScoreInput, by_task
from lewis.store import remote
from lewis.store.remote import Found


@dataclass(frozen=True)
class PlannedStep:
    """One step of the run.

    Attributes:
        name: of its task.
        state: `cached`; `to fetch`, from the remote half of the store; `to do`; or `always`, of a check that each run
            makes.
        cost: what it takes, if it is to be done and that is known.
    """

    name: str
    state: str
    cost: Cost = field(default_factory=Cost)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; with the cost of a step that is to be done, unless the cost is all 0."""
        cost = {"cost": asdict(self.cost)} if self.state == "to do" and self.cost != Cost() else {}
        return {"name": self.name, "state": self.state, **cost}


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        inputs: ref, commit and bytes of each model.
        findings: what configs, tokenizers and headers show of models that do not belong together.
        warning: what is perhaps wrong or not known yet, with `;` between; else empty.
        renamed: which models have other names for the base's tensors, and how they are read.
        layers: the covered layers; empty without a lewis block.
        uncovered: what has weights and is neither covered nor known to be no projection -> its share of the parameters.
        tensors, parameters: of the base.
        gate: its policy, and what it will be able to see, as `lewis.evaluation.outlook`; empty without a gate.
        disk: bytes that the run will write, without downloads; those that a fit keeps meanwhile count, too.
        disk_free: bytes free where the store is.
        memory: bytes that the process will have resident at most, roughly; 0 if nothing is to be measured or merged.
        remote: `LEWIS_STORE`, without its password; empty without a remote half of the store.
        to_fetch: bytes that the remote half has of what is missing here.
        to_push: bytes that the run will push, roughly: statistics and, if they are shared, merged models. All else is
            small.
        output: what an adapter of the merge will be; empty for a full model.
        measuring: seconds that the passes for second-order statistics that are to be done take, roughly.
        seconds: that the merges that are to be done take, roughly, as `lewis merge` reports it afterwards: without the
            start of the process; None if the models are not all here yet.
    """

    recipe: str
    method: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    steps: list[PlannedStep] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    warning: str = ""
    layers: list[Layer] = field(default_factory=list)
    uncovered: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    gate: list[str] = field(default_factory=list)
    disk: int = 0
    disk_free: int = 0
    memory: int = 0
    remote: str = ""
    to_fetch: int = 0
    to_push: int = 0
    output: str = ""
    measuring: float = 0.0
    seconds: float | None = None

    def warn(self, text: str) -> None:
        """Add a text to the warning."""
        self.warning = "; ".join(filter(None, (self.warning, text)))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        findings = [each.to_json() for each in self.findings]
        steps = [each.to_json() for each in self.steps]
        return {**asdict(self), "findings": findings, "steps": steps, "covered_layers": len(self.layers)}

    def to_text(self) -> str:
        """As text for a terminal."""
        kinds: dict[str, list[int]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.projection, []).append(layer.index)
        lines = [
            f"recipe  {self.recipe} ({self.method}), {self.tensors} tensors, {self.parameters / 1e6:.1f} M parameters",
            "",
        ]
        lines += [
            f"input   {row['ref']}  {commits_of(row['commit'])[-1][:23]}  {size_text(row['bytes'])}"
            for row in self.inputs
        ]
        lines += [f"names   {each}" for each in self.renamed]
        lines += ["", f"output  {self.output}"] if self.output else []
        lines += ["", *(each.to_text() for each in self.findings)] if self.findings else []
        lines += ["", f"warning: {self.warning}"] if self.warning else []
        lines += ["", *(f"{step.state:<7} {step.name}" for step in self.steps), ""]
        lines += [
            f"covered {kind}: {len(where)} layers ({min(where)} to {max(where)})" for kind, where in kinds.items()
        ]
        lines += ["covered none: a plain merge"] if not kinds else []
        lines += [f"left    {name}: {100 * share:.1f} % of the parameters" for name, share in self.uncovered.items()]
        lines += [f"{'' if number else 'gate':<7} {each}" for number, each in enumerate(self.gate)]
        lines.append(f"disk    {size_text(self.disk)} to write, {size_text(self.disk_free)} free in {store.home()}")
        if self.remote:
            moved = f"{size_text(self.to_fetch)} to fetch, about {size_text(self.to_push)} to push"
            lines.append(f"remote  {moved}, {self.remote}")
        if self.memory:
            lines.append(f"memory  about {size_text(self.memory)}")
        time = "unknown until all models and rows are here" if self.seconds is None else f"about {self.seconds:.1f} s"
        lines.append(f"time    {time}, for the merges")
        lines += (
            [f"        about {self.measuring:.1f} s, for statistics of the experts' inputs"] if self.measuring else []
        )
        return "\n".join(lines)


class _NotHere(ModelFiles):
    """A model that is not on this disk: its configs are, and the headers of its weight files are known."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, source: Source) -> _NotHere:
        """Return the stand-in of a pinned model: fetch its configs, and read the headers of its weights."""
        folder, *adapters = [repository.fetch(each, weights=False) for each in (source.model, *source.adapters)]
        shapes = repository.tensor_shapes(source.model)
        under, adapter = tuple(adapters[:-1]), adapters[-1] if adapters else None
        ref, key = source.ref, source.key
        return cls(ref=ref, key=key, folder=folder, adapter=adapter, under=under, sizes={}, shapes=shapes)

    @property
    def read_as(self) -> str:
        """Identity of the content. (Under which names it will be read is known once the model is here.)"""
        return self.key

    def outline(self) -> tuple[Path, dict[str, tuple[int, ...]]]:
        """The folder with its config, and the shape of every tensor."""
        return self.folder, self.shapes


_UNREACHED = object()
"""Stands for a calibration set whose dataset the Hub does not answer for right now."""


@dataclass(frozen=True)
class _Unmade:
    """A merged model that is not in the store, or the champion; `key` is empty if it is not known."""

    key: str

    def files(self, label: str) -> None:
        """Return None: its files are not on this machine, so nothing can be read from them."""


def make_plan(recipe: Recipe) -> Plan:
    """Find out what a run of `recipe` would do.

    Raises:
        InputError: as a run would, for everything that can be known before the work.
    """
    if recipe.publish:
        from lewis.registry import publishing  # brings the Hub's client with it

        publishing.check_base(recipe.base_model, recipe.root, adapter=recipe.output.kind == "lora")
    check_tasks(recipe)
    base, experts = pin_all(recipe)
    renamed = preflight(recipe, base, experts, needed=recipe.needs_network)
    check_scored(recipe, base, experts)
    plan = Plan(recipe.name, recipe.merge_method + (f", anchor {recipe.anchor.merge_method}" if recipe.anchor else ""))
    plan.renamed = renamed
    plan.gate = outlook(recipe.gate, recipe.evaluate, recipe.root) if recipe.gate and recipe.evaluate else []
    sources = ([base] if base else []) + experts
    plan.inputs = [{"ref": s.ref, "commit": s.key, "bytes": s.size} for s in sources]
    plan.findings = before_download(base, experts, inspection_settings(recipe))
    plan.warning = warning_of_shared_set(recipe)
    headers = result_headers(recipe, base, experts)
    count = {name: math.prod(shape) for name, (_, shape) in headers.items()}
    plan.tensors, plan.parameters = len(headers), sum(count.values())
    if (recipe.lewis or recipe.fits) and base:
        shapes = repository.tensor_shapes(base.model)
        configs = repository.fetch(base.model, weights=False)
        covered, plan.uncovered = covered_tensors(configs, shapes, measured=recipe.runs_models)
        plan.layers = [layer for each in covered for layer in each.layers]
    _add_steps(plan, recipe, pinned(base, experts))
    plan.output = _adapter_of(recipe) if recipe.output.kind == "lora" else ""
    plan.disk_free = store.free_space(store.home())
    _add_merges(plan, recipe, headers, len(experts))
    plan.steps += [PlannedStep(f"register {recipe.register_as.model}", "to do")] if recipe.register_as else []
    plan.steps += [PlannedStep(f"publish {recipe.publish.repo}", "to do")] if recipe.publish else []
    return plan


def _add_merges(plan: Plan, recipe: Recipe, headers: Headers, experts: int) -> None:
    """Add time, disk and memory of the merges.

    If models are not downloaded yet, disk and memory follow from the headers of the result, and the time is unknown.
    """
    merges = [each for each in plan.steps if each.name.startswith(f"{MERGE.name} ") and each.state == "to do"]
    if any(each.cost.seconds is None for each in merges):
        largest = max(math.prod(shape) for _, shape in headers.values())
        uncounted = [each for each in merges if not each.cost.written]
        written = len(uncounted) * _bytes_of_output(recipe, headers)
        plan.disk += written
        plan.to_push += written if plan.remote and STORE_MERGED.get() else 0
        plan.memory = max(plan.memory, without_models(find(recipe.guided_method), largest, experts))
        plan.seconds = None
    else:
        plan.seconds = sum((each.cost.seconds or 0) - each.cost.passes for each in merges)
    plan.memory += mapped_bytes() if plan.memory else 0  # forecasts leave out mapped files


def _bytes_of_output(recipe: Recipe, headers: Headers) -> int:
    if recipe.output.kind == "lora":
        merged = {name: shape for name, (_, shape) in headers.items() if not recipe.excludes(name)}
        return factor_bytes(merged, recipe.output.rank)
    out = stored_dtype(recipe)
    return sum(math.prod(shape) * _width(out or dtype) for dtype, shape in headers.values())


def _add_steps(plan: Plan, recipe: Recipe, known: Mapping[str, Any]) -> None:
    """Add the steps of a recipe, their costs, and the bytes that can be fetched from the remote half of the store."""
    walked, results = graph(recipe), dict(known)
    if walked.of(EVALUATE):
        results[CHAMPION] = _champion(plan, recipe, versions.champion)
        if results[CHAMPION] and MARK in labels(recipe).values():
            results[MARK] = _champion(plan, recipe, promotion.mark)
    with remote.looking() as asked:
        for node in walked:
            if node.step is EVALUATE:
                continue
            try:
                plan.steps.append(_look(node, results, asked))
            except TransientError as error:
                if node.step is not CALIBRATE:
                    raise
                results[node.name] = _UNREACHED
                plan.steps.append(PlannedStep(node.label, "to do"))
                plan.warn(f"not known yet: {error}")
        if waiting := [node.label for node in walked.of(CONTINUE) if results[node.name] is None]:
            plan.warn(f"until {' and '.join(waiting)} is done, time and memory count the prompts alone")
        block, merged = recipe.evaluate, results.get("merge experts")
        if block and block.stop != "never" and merged and merged.key:  # else it is not known at which look it will end
            champion = results.get(CHAMPION)
            results[LOOK] = look_to_show(recipe, merged.key, champion.key if champion else None)
        plan.steps += _look_at_scores(walked, results, asked)
    for files in results.values():
        if isinstance(files, ModelFiles) and not isinstance(files, _NotHere) and files.adapter:
            opened = files.open()
            if isinstance(opened, LoraExpert) and opened.summary:
                plan.renamed.append(f"{files.ref}: {opened.summary}")
    _add_costs(plan, walked)
    plan.remote = redacted(remote.url())
    plan.to_fetch = sum({each.path: each.size for each in asked if not each.path.exists()}.values())


def _add_costs(plan: Plan, walked: Graph) -> None:
    costs = {each.name: each.cost for each in plan.steps}
    for node in walked:
        cost = costs.get(node.label, Cost())
        if node.step is not DOWNLOAD:
            plan.disk += cost.written + cost.scratch
        if node.step.kind and remote.shares(node.step.kind.path("0" * 64)):
            plan.to_push += cost.written
        plan.measuring += cost.passes
        plan.memory = max(plan.memory, cost.memory)


def _look(node: Node, results: dict[str, Any], asked: Sequence[Found]) -> PlannedStep:
    """Look for the result of a node's step, and add it, or a stand-in for it, to the results."""
    step, before = node.step, len(asked)
    unknown = [name for name in node.needs if name in results and results[name] is None]
    # A merge can be found without the statistics that it is fitted to: they follow from the models and the rows.
    missing = any(not (step is MERGE and name.startswith(f"{MEASURE.name} ")) for name in unknown)
    absent = any(isinstance(results.get(name), _NotHere) for name in node.needs)
    unreached = any(results.get(name) is _UNREACHED for name in node.needs)
    # A merge is checked and timed without its densities: the time does not depend on them.
    known = not (step.opens and absent) and not unreached and (not missing or step is MERGE)
    given: Any = node.given(results) if known else None
    if step is CHECK:
        if given is not None:
            step.make(replace(given, copies=0, covers=False, warning=""), silent, "cpu")
        results[node.name] = 0
        return PlannedStep(node.label, "always")
    found = None if given is None or missing else step.find(given)
    state = "cached" if found is not None else "to fetch" if len(asked) > before else "to do"
    results[node.name] = _stand_in(step, given, key=not missing) if found is None else found
    if state != "to do":
        return PlannedStep(node.label, state)
    return PlannedStep(node.label, state, Cost(seconds=None) if given is None else step.cost(given))


def _stand_in(step: Step[Any, Any], given: Any, *, key: bool) -> Any:
    """Return a stand-in for a missing result, by which results that depend on it can be looked for, or None."""
    if step is DOWNLOAD:
        return _NotHere.of(given)
    if step is CALIBRATE:
        return step.make(given, silent, "cpu")  # it is cheap, and the results that depend on it are found by it
    if step is MERGE:
        return _Unmade(step.key(given) if key and given is not None else "")
    return None


def _look_at_scores(walked: Graph, results: Mapping[str, Any], asked: Sequence[Found]) -> list[PlannedStep]:
    """Look for scores: those that are compared with each other must have been computed in one number format."""
    nodes = [node for node in walked.of(EVALUATE) if node.when is None or node.when(results)]
    found = dict[str, str]()
    for of_task in by_task({node.name: node.given(results) for node in nodes}):
        plans = [{name: _state(each, device, asked) for name, each in of_task.items()} for device in scoring_devices()]
        fewest: dict[str, str] = min(plans, key=lambda states: list(states.values()).count("to do"))
        found |= fewest
    return [PlannedStep(node.name, found[node.name]) for node in nodes]


def _state(given: ScoreInput, device: str, asked: Sequence[Found]) -> str:
    before = len(asked)
    if given.key and find_score(given.ref, given.key, given.settings, device):
        return "cached"
    return "to fetch" if len(asked) > before else "to do"


def _champion(plan: Plan, recipe: Recipe, find: Callable[[str], Champion | None]) -> _Unmade | None:
    """The champion, or the gate's mark, that a run would score next to the merged model.

    Returns:
        None if there is none, or MLflow does not say.
    """
    if recipe.register_as is None or not tracking.exists():
        return None
    try:
        current = find(recipe.register_as.model)
    except LewisError as error:
        plan.warn(f"the champion is not known: {error}")
        return None
    return _Unmade(current.digest) if current and current.digest else None


def _adapter_of(recipe: Recipe) -> str:
    """Describe the adapter that a merge will make, as far as it is known before."""
    rank, tolerance = recipe.output.rank, recipe.output.tolerance
    limits = [f"rank at most {rank}"] if rank else []
    limits += [f"error of a module at most {tolerance:g} of its merged delta"] if tolerance else []
    unknown = "its error is" if rank else "its ranks and size are"
    return f"LoRA adapter on {recipe.base_model}, {', '.join(limits)}; {unknown} known after the merge"


def _width(dtype: str) -> int:
    """Bytes per element; 4 for a dtype that no merge takes, which is reported later."""
    return DTYPES[dtype].size if dtype in DTYPES else 4
