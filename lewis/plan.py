"""What a run would do, found out without doing it: only configs and tokenizers are downloaded."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lewis import pipeline, store
from lewis.devices import default_device
from lewis.errors import LewisError
from lewis.evaluation import lm_eval
from lewis.evaluation.metric_names import check_names
from lewis.evaluation.step import scoring_devices
from lewis.importance import grams, measure
from lewis.importance.calibration import Calibration
from lewis.importance.coverage import covered_tensors
from lewis.importance.measure import Layer
from lewis.importance.step import CalibrationEntry, grams_place
from lewis.inspection.kinds import Finding
from lewis.inspection.step import before_download
from lewis.merging.few_tokens import told_of_shared_set
from lewis.merging.forecast import forecast, without_models
from lewis.merging.low_rank import factor_bytes
from lewis.merging.resolved import stored_dtype
from lewis.merging.run import Merge
from lewis.merging.split import split
from lewis.merging.step import check_output
from lewis.methods import find
from lewis.models import hub
from lewis.models.compatible import result_headers
from lewis.models.dtypes import DTYPES
from lewis.models.lora import LoraExpert
from lewis.models.names import layer_of
from lewis.models.source import ModelFiles, Source
from lewis.recipe.recipe import Recipe
from lewis.redact import redacted
from lewis.registry import publishing
from lewis.store import remote
from lewis.store.remote import Found


@dataclass(frozen=True)
class Step:
    """One step of the DAG; `state` is `cached`, `to fetch` from the remote half of the store, or `to do`."""

    name: str
    state: str


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        inputs: ref, commit and bytes of each model.
        findings: what configs, tokenizers and headers tell of models that do not belong together.
        warning: what is perhaps wrong with the calibration sets of a fit, as a sentence; else empty.
        renamed: which models have other names for the base's tensors, and how they are read.
        layers: the covered layers; empty without a lewis block.
        uncovered: what has weights and is neither covered nor known to be no projection -> its share of the parameters.
        tensors, parameters: of the base.
        disk: bytes that the run will write, beside downloads; those that a fit keeps meanwhile count, too.
        disk_free: bytes free where the store is.
        memory: bytes of anonymous memory that the importance pass and the merge need at most, roughly.
        remote: `LEWIS_STORE`, without its password; empty without a remote half of the store.
        to_fetch: bytes that the remote half has of what is missing here.
        to_push: bytes that the run will push, roughly: statistics and, if they are shared, merged models. All else is
            small.
        output: what an adapter of the merge will be; empty for a full model.
        measuring: seconds that the passes for second-order statistics take which are to do, roughly.
        seconds: that the merges take which are to do, roughly, as `lewis merge` tells it afterwards: without the start
            of the process; None if the models are not all here yet.
    """

    recipe: str
    method: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    warning: str = ""
    layers: list[Layer] = field(default_factory=list)
    uncovered: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    disk: int = 0
    disk_free: int = 0
    memory: int = 0
    remote: str = ""
    to_fetch: int = 0
    to_push: int = 0
    output: str = ""
    measuring: float = 0.0
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        findings = [each.to_json() for each in self.findings]
        return {**asdict(self), "findings": findings, "covered_layers": len(self.layers)}

    def to_text(self) -> str:
        """For a terminal."""
        kinds: dict[str, list[int]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.projection, []).append(layer.index)
        lines = [
            f"recipe  {self.recipe} ({self.method}), {self.tensors} tensors, {self.parameters / 1e6:.1f} M parameters",
            "",
        ]
        lines += [f"input   {row['ref']}  {row['commit'][:23]}  {row['bytes'] / 1e6:.1f} MB" for row in self.inputs]
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
        lines.append(f"disk    {self.disk / 1e9:.3f} GB to write, {self.disk_free / 1e9:.1f} GB free in {store.home()}")
        if self.remote:
            moved = f"{self.to_fetch / 1e9:.3f} GB to fetch, about {self.to_push / 1e9:.3f} GB to push"
            lines.append(f"remote  {moved}, {self.remote}")
        lines.append(f"memory  about {self.memory / 1e9:.2f} GB")
        told = "unknown until all models are here" if self.seconds is None else f"about {self.seconds:.1f} s"
        lines.append(f"time    {told}, for the merges")
        lines += (
            [f"        about {self.measuring:.1f} s, for statistics of the experts' inputs"] if self.measuring else []
        )
        return "\n".join(lines)


def make_plan(recipe: Recipe) -> Plan:
    """Find out what a run of `recipe` would do.

    Raises:
        InputError: as a run would, for everything that can be known before the work.
    """
    if recipe.publish:
        publishing.check_base(recipe.base_model, recipe.root, adapter=recipe.output.kind == "lora")
    if recipe.evaluate:
        lm_eval.check_tasks(
            recipe.evaluate.tasks, recipe.root, allow_code_execution=recipe.evaluate.allow_code_execution
        )
        check_names(recipe)
    base, experts = pipeline.pin_all(recipe)
    renamed = pipeline.preflight(recipe, base, experts)
    plan = Plan(recipe.name, recipe.merge_method + (f", anchor {recipe.anchor.merge_method}" if recipe.anchor else ""))
    plan.renamed = renamed
    sources = ([base] if base else []) + experts
    plan.inputs = [{"ref": s.ref, "commit": s.key, "bytes": s.size} for s in sources]
    plan.findings, plan.warning = (
        before_download(base, experts, pipeline.inspection_settings(recipe)),
        told_of_shared_set(recipe),
    )
    headers = result_headers(recipe, base, experts)
    count = {name: math.prod(shape) for name, (_, shape) in headers.items()}
    plan.tensors, plan.parameters = len(headers), sum(count.values())
    out = stored_dtype(recipe)
    output = sum(count[name] * _width(out or dtype) for name, (dtype, _) in headers.items())
    if recipe.output.kind == "lora":
        merged = {name: shape for name, (_, shape) in headers.items() if not recipe.excludes(name)}
        output, plan.output = factor_bytes(merged, recipe.output.rank), _adapter_of(recipe)
    files = {source.ref: _files(source) for source in sources}
    plan.steps = [Step(f"download {s.ref}", "cached" if files[s.ref] else "to do") for s in sources]
    if recipe.lewis and base:
        shapes = {name: shape for name, (_, shape) in hub.tensor_headers(base.model).items()}
        configs = hub.fetch(base.model, weights=False)
        covered, plan.uncovered = covered_tensors(configs, shapes, measured=recipe.runs_models)
        plan.layers = [layer for each in covered for layer in each.layers]
    with remote.looking() as asked:
        writes, prepared, passes = _guided_steps(plan, recipe, base, experts, files, asked)
    # A calibration set is made again for the plan, so it is here by now.
    plan.remote = redacted(remote.url())
    plan.to_fetch = sum({each.path: each.size for each in asked if not each.path.exists()}.values())
    plan.to_push = output * len(writes) if plan.remote and remote.shares_merged() else 0
    plan.disk, plan.disk_free = output * len(writes), store.free_space(store.home())
    if passes and recipe.needs_grams:
        network = measure.network_in(configs, shapes)
        statistics = sum(grams.bytes_of(network, tokens) for tokens in passes)
        plan.disk += statistics
        plan.to_push += statistics if plan.remote else 0
        per_second = grams.operations_per_second() * len(os.sched_getaffinity(0))
        plan.measuring = sum(grams.operations_of(network, tokens) for tokens in passes) / per_second
    if writes and prepared and plan.disk < plan.disk_free:
        found = forecast(prepared)  # before anything loads the compiled loops, which takes a part of the time
        plan.seconds, plan.memory = found.seconds * len(writes), found.memory
        plan.disk += found.disk
    else:
        plan.seconds = None if writes else 0.0
        plan.memory = without_models(find(recipe.guided_method), max(count.values()), len(experts))
    if pipeline.wanted_measurements(recipe):
        statistics = grams.memory_of(network, max(passes), len(os.sched_getaffinity(0))) if plan.measuring else 0
        plan.memory = max(plan.memory, _memory_of_pass(count) + statistics)
    if recipe.register_as:
        plan.steps.append(Step(f"register {recipe.register_as.model}", "to do"))
    if recipe.publish:
        plan.steps.append(Step(f"publish {recipe.publish.repo}", "to do"))
    return plan


def _adapter_of(recipe: Recipe) -> str:
    """What is known of an adapter before it is made."""
    rank, tolerance = recipe.output.rank, recipe.output.tolerance
    limits = [f"rank at most {rank}"] if rank else []
    limits += [f"error of a module at most {tolerance:g} of its merged delta"] if tolerance else []
    unknown = "its error is" if rank else "its ranks and size are"
    return f"LoRA adapter on {recipe.base_model}, {', '.join(limits)}; {unknown} known after the merge"


def _width(dtype: str) -> int:
    """Bytes per element; 4 for a dtype that no merge takes, which is reported later."""
    return DTYPES[dtype].size if dtype in DTYPES else 4


def _memory_of_pass(elements: Mapping[str, int]) -> int:
    """Bytes that an importance pass needs at most, roughly: torch, what is outside of the layers, two layers in fp32.

    Args:
        elements: tensor -> how many.
    """
    sizes = Counter[int | None]()
    for name, number in elements.items():
        sizes[layer_of(name)] += 4 * number
    outside = sizes.pop(None, 0)
    return 450_000_000 + outside + 2 * max(sizes.values(), default=0)


def _guided_steps(
    plan: Plan,
    recipe: Recipe,
    base: Source | None,
    experts: list[Source],
    files: dict[str, ModelFiles | None],
    asked: list[Found],
) -> tuple[list[str], Merge | None, list[int]]:
    """Add the steps after the downloads.

    Args:
        asked: the entries that the remote half of the store turns out to have.

    Returns:
        The merges that are still to be written; one of them if it can be done; and the tokens of each pass to do.
    """
    known_base = files[base.ref] if base else None
    known = [files[source.ref] for source in experts]
    present = [each for each in known if each is not None]
    complete = len(present) == len(known) and (base is None or known_base is not None)
    allocated, passes, sets = None, list[int](), dict[str, CalibrationEntry]()
    if recipe.lewis and base:
        measured = []
        for entry, names in pipeline.wanted_measurements(recipe):
            source = base if entry is None else experts[recipe.experts.index(entry)]
            for name in names:
                if name not in sets:
                    configs = hub.fetch(base.model, weights=False)
                    sets[name] = pipeline.prepare_calibration(recipe, name, ModelFiles.at(base.ref, base.key, configs))
                key = _read_as(source, files)
                of_pass = (source.ref, key, sets[name], recipe.lewis.importance, default_device())
                before = len(asked)
                found = pipeline.find_measured(*of_pass, grams=recipe.needs_grams and entry is not None)
                passes += [] if found or len(asked) > before else [sets[name].tokens]
                plan.steps.append(Step(f"measure {source.ref} on {name}", _state(found, asked, before)))
                measured.append(found)
        if recipe.allocator and known_base and complete and all(measured):
            allocated = pipeline.find_allocated(recipe, known_base, present, [m for m in measured if m])
        plan.steps += [Step("allocate", "cached" if allocated else "to do")] if recipe.allocator else []
    writes, merged_keys, prepared = [], {}, None
    if complete:
        prepared = pipeline.prepare_merge(recipe, known_base, present, allocated)
        opened = {expert.ref: expert.model for expert in prepared.experts if isinstance(expert.model, LoraExpert)}
        plan.renamed += [f"{ref}: {model.told}" for ref, model in opened.items() if model.told]
        check_output(recipe, prepared)
        if recipe.allocator and not allocated:  # any density takes as long
            guess = dict.fromkeys(prepared.layout, 0.5)
            for guided in prepared.guided:
                guided.experts = [replace(expert, densities=guess) for expert in guided.experts]
    for which, label in {"experts": recipe.label, **({"uniform": "uniform"} if recipe.wants_uniform else {})}.items():
        digest = None
        if prepared and (allocated or not recipe.allocator):
            own = which == "experts"
            digest = (prepared if own else pipeline.prepare_merge(recipe, known_base, present, allocated, which)).digest
        before = len(asked)
        cached = digest and pipeline.find_merged(digest)
        plan.steps.append(Step(f"merge {label}", _state(cached, asked, before)))
        merged_keys[label] = digest
        writes += [] if cached or len(asked) > before else [which]
    if recipe.evaluate:
        settings = pipeline.eval_settings(recipe)
        scored_parents = [base] if base and recipe.scores_base else []
        if recipe.scores_experts:
            scored_parents += [e for e in experts if base is None or e.ref != base.ref]
        keys = {source.ref: source.key for source in scored_parents}
        for label, whose in {**keys, **merged_keys}.items():
            before = len(asked)
            scored = whose and any(
                pipeline.find_scores(label, whose, settings, recipe.root, device) for device in scoring_devices()
            )
            plan.steps.append(Step(f"evaluate {label}", _state(scored, asked, before)))
    if "experts" in writes and recipe.tunes and recipe.needs_grams:
        passes += _passes_for_ridge(recipe, [_read_as(source, files) for source in experts], sets)
    return writes, prepared, passes


def _state(found: object, asked: Sequence[Found], before: int) -> str:
    """The state of a step: whether its entry was found here, or on the remote half since `asked` had `before`."""
    return "cached" if found else "to fetch" if len(asked) > before else "to do"


def _read_as(source: Source, files: Mapping[str, ModelFiles | None]) -> str:
    """Identity of what is read of a model; that of its content until it is here."""
    here = files[source.ref]
    return here.read_as if here else source.key


def _passes_for_ridge(recipe: Recipe, keys: Sequence[str], sets: Mapping[str, CalibrationEntry]) -> Iterator[int]:
    """Tokens of each pass that `ridge: auto` has yet to do: over the rows of an expert that are not held out."""
    for entry, key in zip(recipe.experts, keys, strict=True):
        fitted_to, _ = split(Calibration.load(sets[recipe.calibration_of(entry)].path))
        _, folder = grams_place(key, fitted_to.digest, default_device())
        if store.read_manifest(folder) is None:
            yield fitted_to.tokens


def _files(source: Source) -> ModelFiles | None:
    """The model's files if they are on this disk already."""
    if not all(hub.is_present(pinned) for pinned in (source.model, *source.adapters)):
        return None
    try:
        return pipeline.download(source)
    except LewisError:
        return None
