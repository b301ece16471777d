"""The steps of a merge on the store: each finds its entry by content, or makes it once, under a lock.

The Prefect tasks and the command line call the same functions, so that they find each other's entries.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from lewis import store
from lewis.allocation import densities as allocation
from lewis.allocation import evidence as metrics
from lewis.allocation import global_threshold
from lewis.allocation.densities import Allocation
from lewis.devices import merge_device, precision
from lewis.entries import (
    AllocationEntry,
    CalibrationEntry,
    ImportanceEntry,
    MergedModel,
    ModelFiles,
    ScoresEntry,
    Source,
)
from lewis.errors import InputError
from lewis.evaluation import lm_eval
from lewis.evaluation.lm_eval import EvalSettings
from lewis.evaluation.scored import Scored
from lewis.importance import calibration
from lewis.importance import measure as importance
from lewis.importance import measured as measurements
from lewis.importance.architecture import Layer, Network
from lewis.importance.calibration import Calibration
from lewis.merge.run import Expert, Merge, excluded
from lewis.methods import find
from lewis.models import hub
from lewis.models.checkpoint import HEADS, PER_TOKEN, read_config, weight_files
from lewis.models.compatible import in_layers
from lewis.models.lora import Model, is_adapter
from lewis.models.tokenizer import FIX, clash, tokenizer_folder
from lewis.recipe.recipe import Importance, ModelEntry, Recipe
from lewis.store.checksums import place_of

logger = logging.getLogger(__name__)


def pin(ref: str, root: Path, base: Source | None = None) -> Source:
    """Resolve a model reference to commits: `model`, `model+adapter`, or an adapter of `base`.

    Raises:
        InputError: if it does not exist, or is an adapter and there is no base.
        TransientError: if the Hub cannot be asked right now.
    """
    if "+" in ref and not any(place.exists() for place in (root / ref, Path(ref))):
        model, _, adapter = ref.rpartition("+")
        return Source(ref, hub.resolve(model, root), hub.resolve(adapter, root))
    pinned = hub.resolve(ref, root)
    if not is_adapter(hub.fetch(pinned, weights=False)):
        return Source(ref, pinned)
    if base is None:
        raise InputError(f"{ref}: a LoRA adapter needs its base: set base_model, or write base+adapter")
    if base.adapter is not None:
        raise InputError(f"{ref}: a LoRA adapter on a base that is one itself ({base.ref}); merge the base's first")
    return Source(ref, base.model, pinned)


def pin_all(recipe: Recipe) -> tuple[Source | None, list[Source]]:
    """Pin the base (None if the recipe has none) and the experts, in the recipe's order.

    Experts are pinned several at a time: to hash the files of new folders takes longer than to merge them.
    """
    base = pin(recipe.base_model, recipe.root) if recipe.base_model else None
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return base, list(pool.map(lambda entry: pin(entry.model, recipe.root, base), recipe.experts))


def preflight(recipe: Recipe, base: Source | None, experts: Sequence[Source]) -> None:
    """Check names, shapes and filters from the weight files' headers, before gigabytes are downloaded.

    Raises:
        InputError: naming every expert and tensor that does not fit.
        RecipeError: naming every filter that matches nothing.
    """
    for source in ([base] if base else []) + list(experts):
        if source.model.is_local:  # what is wrong with a folder itself is told first
            read_config(Path(source.model.source))
            weight_files(Path(source.model.source))
    first = base or experts[0]
    full = [source for source in experts if source.model.commit != first.model.commit]
    ours, problems = hub.tensor_headers(first.model), []
    wanted, by_token = [name for name in ours if not recipe.excludes(name)], recipe.vocabulary is not None
    for source in full:
        theirs = hub.tensor_headers(source.model)
        missing = [name for name in wanted if name not in theirs and not name.endswith(HEADS)]
        extra = in_layers(name for name in theirs if name not in ours)
        other = []
        for name in wanted:
            free = int(by_token and name.endswith(PER_TOKEN))  # the first dimension may differ
            if name in theirs and theirs[name][1][free:] != ours[name][1][free:]:
                other.append(name)
        if missing:
            problems.append(
                f"{source.ref}: {len(missing)} tensors of the base are missing, the first is {missing[0]!r}"
            )
        if extra:
            problems.append(f"{source.ref}: {len(extra)} tensors are not in the base, the first is {extra[0]!r}")
        if other:
            shapes = f"{list(theirs[other[0]][1])}, in the base it is {list(ours[other[0]][1])}"
            fix = f"; {FIX}" if other[0].endswith(PER_TOKEN) and not by_token else ""
            problems.append(f"{source.ref}: {other[0]!r} has shape {shapes}{fix}")
    if problems:
        raise InputError("\n".join([*problems, f"expected fine-tunes of {first.ref}, of the same architecture"]))
    recipe.check_filters(ours)


def download(source: Source) -> ModelFiles:
    """Bring a pinned model to the disk, verified.

    Raises:
        TransientError: if the transfer broke; trying again can help.
    """
    adapter = hub.fetch(source.adapter) if source.adapter else None
    return ModelFiles.at(source.ref, source.key, hub.fetch(source.model), adapter)


def prepare_calibration(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """Tokenise one calibration set of the recipe and put it into the store.

    What was made of the same rows by the same tokenizer is found, so that a run which has nothing to do need not load
    the libraries that do it.
    """
    assert recipe.lewis is not None
    spec = recipe.lewis.calibrations[name]

    def note() -> Path:
        libraries = [version("datasets"), version("transformers")]
        rows = calibration.origin(f"lewis.calibrations.{name}", spec, recipe.root)
        block = spec.model_dump(mode="json", exclude_unset=True)
        return place_of([calibration.SEMANTICS, libraries, base.key, block, rows])

    place = note()
    known = store.entry(place, "calibration") or {}
    path = calibration.path_of(known.get("digest", ""))
    if store.read_entry(path) is None:
        made = calibration.calibrate(name, spec, tokenizer=base.folder, root=recipe.root)
        known, path = {"digest": made.digest, "tokens": made.tokens}, made.save()
        if note() == place:  # no row moved meanwhile
            store.write_json(place, {"calibration": known})
    return CalibrationEntry(name=name, path=path, **known)


def measure(
    files: ModelFiles,
    calibrations: Sequence[CalibrationEntry],
    settings: Importance | None = None,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[ImportanceEntry]:
    """Importance of one model on each calibration set; what the store does not have is measured, in one pass."""
    settings = settings or Importance()
    places = {each.digest: _importance_place(files.key, each, settings, device) for each in calibrations}
    missing = {each.digest: each for each in calibrations if not measurements.is_whole(places[each.digest][1])}
    with ExitStack() as locks:
        for digest in sorted(places[tokens][0] for tokens in missing):  # in one order: nobody waits in a circle
            locks.enter_context(store.lock(f"importance-{digest}"))
        absent = [each for each in missing.values() if not measurements.is_whole(places[each.digest][1])]
        if absent:
            sets = [Calibration.load(each.path) for each in absent]
            found = importance.measure_sets(files.open(), sets, settings, device=device, progress=progress)
            for each, measured in zip(absent, found, strict=True):
                facts = {"model": files.key, "ref": files.ref, "calibration": each.digest}
                measurements.write(places[each.digest][1], measured, facts)
    pairs = [(each.name, *places[each.digest]) for each in calibrations]
    return [ImportanceEntry(ref=files.ref, calibration=name, digest=digest, path=path) for name, digest, path in pairs]


def find_measured(
    ref: str, key: str, calibration: CalibrationEntry, settings: Importance, device: str = "cpu"
) -> ImportanceEntry | None:
    """The importance of a model on a calibration set, if the store has it."""
    digest, path = _importance_place(key, calibration, settings, device)
    if not measurements.is_whole(path):
        return None
    return ImportanceEntry(ref=ref, calibration=calibration.name, digest=digest, path=path)


def _importance_place(key: str, calibration: CalibrationEntry, settings: Importance, device: str) -> tuple[str, Path]:
    of_pass = settings.model_dump(exclude={"metric"})  # every metric is made of what one pass measures
    digest = store.digest([importance.SEMANTICS, key, calibration.digest, precision(device), of_pass])
    return digest, store.home() / "importance" / f"{digest}.json"


def allocate(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Sequence[ImportanceEntry]
) -> AllocationEntry:
    """Densities of every expert, and of the uniform baseline.

    Args:
        recipe: with a `lewis` block.
        base: the base.
        experts: in the order of `recipe.experts`.
        measured: importance of base and experts on the sets they need; empty for `uniform`.
    """
    assert recipe.lewis is not None
    policy = recipe.lewis.density
    digest, path = _allocation_place(recipe, base, experts, measured)
    with store.lock(f"allocation-{digest}"):
        if store.entry(path, "experts") is None:
            opened = base.open()
            network, left_out = importance.network_of(opened), excluded(recipe, opened)
            network.covered = tuple(each for each in network.covered if each.tensor not in left_out)
            if not network.covered:
                raise InputError("exclude: it matches every covered layer; leave the lewis block out")
            layers = [layer for covered in network.covered for layer in covered.layers]
            names, guided = [name for name in opened.tensors if name not in left_out], {}
            tensors, warnings = [covered.tensor for covered in network.covered], list[str | None]()
            for entry, files in zip(recipe.experts, experts, strict=True):
                evidence = _evidence(recipe, entry, base, files, measured, network)
                each = allocation.allocate(layers, names, policy, evidence)
                warnings.append(metrics.unrelated(files.ref, opened, files.open(), tensors))
                warnings.append(_near_uniform(recipe, files.ref, layers, each))
                guided[files.ref] = each
            warnings.append(_rescaled(recipe, layers, guided))
            uniform = {ref: allocation.uniform_like(layers, each) for ref, each in guided.items()}
            named = {"experts": guided, "uniform": uniform}
            content = {w: {ref: a.to_json() for ref, a in group.items()} for w, group in named.items()}
            store.write_json(path, {**content, "warnings": list(filter(None, warnings))})
    for text in store.entry(path, "warnings") or []:  # also of densities that were found
        logger.warning("%s", text)
    found = find_allocated(recipe, base, experts, measured)
    assert found is not None
    return found


def _evidence(
    recipe: Recipe,
    entry: ModelEntry,
    base: ModelFiles,
    expert: ModelFiles,
    measured: Sequence[ImportanceEntry],
    network: Network,
) -> dict[str, float | None] | None:
    """What the allocator goes by: key of a layer -> how far it moved, or its density under one threshold."""
    assert recipe.lewis is not None
    policy, own_base, own = recipe.lewis.density, base.open(), expert.open()
    if not recipe.measures:
        return None
    name = recipe.calibration_of(entry)
    found = _by_model(measured)
    if policy.strategy in ("uniform", "depth_gradient"):  # they need to know only what no token reached
        return {key: None if norm is None else 1.0 for key, norm in found[expert.ref, name].norms.items()}
    if recipe.compares_norms:
        return metrics.norm_difference(found[base.ref, name].norms, found[expert.ref, name].norms)
    moments = found[expert.ref, name].moments
    if policy.strategy == "global":
        target = allocation.target_of(policy)
        bounds = {"target": target, "low": policy.min, "high": policy.max}
        return global_threshold.shares(own_base, own, network.covered, moments, **bounds)
    metric = {"owl": "outlier", "dlp": "median"}.get(policy.strategy, recipe.lewis.importance.metric)
    return metrics.of_task_vector(metric, own_base, own, network.covered, moments)


def _by_model(measured: Sequence[ImportanceEntry]) -> dict[tuple[str, str], ImportanceEntry]:
    """(reference of a model, calibration set) -> what was measured."""
    return {(each.ref, each.calibration): each for each in measured}


def _near_uniform(recipe: Recipe, ref: str, layers: Sequence[Layer], found: Allocation) -> str | None:
    distance = allocation.distance_to_uniform(layers, found)
    if not recipe.guided or distance >= allocation.NEAR_UNIFORM:
        return None
    return (
        f"{ref}: the densities are within {100 * distance:.1f} % of uniform {found.mean:.3f}: this allocation guides "
        "next to nothing; see lewis.density.scale (rank, robust), another strategy, or prune_by: activation"
    )


def _rescaled(recipe: Recipe, layers: Sequence[Layer], found: Mapping[str, Allocation]) -> str | None:
    rescale = find(recipe.merge_method).parameters.get("rescale")
    uneven = max(allocation.distance_to_uniform(layers, each) for each in found.values()) >= allocation.NEAR_UNIFORM
    if not (recipe.guided and uneven and rescale and recipe.value(rescale, None, layers[0].tensor, 0.0)):
        return None
    return (
        f"{recipe.merge_method} brings each tensor back to its norm, so what is kept of a layer of low density is "
        "scaled up most: in our study uneven densities did such merges more harm than good; compare with the uniform "
        "baseline, or set parameters.rescale: false"
    )


def find_allocated(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Sequence[ImportanceEntry]
) -> AllocationEntry | None:
    """The densities, if the store has them."""
    digest, path = _allocation_place(recipe, base, experts, measured)
    content = store.entry(path, "experts")
    if content is None:
        return None
    assert recipe.lewis is not None
    own, of_base = {}, list[ImportanceEntry]()
    if recipe.lewis.prune_by == "activation":
        found = _by_model(measured)
        pairs = zip(recipe.experts, experts, strict=True)
        own = {files.ref: found[files.ref, recipe.calibration_of(entry)] for entry, files in pairs}
    if recipe.lewis.aim is not None:
        of_base = [entry for entry in measured if entry.ref == base.ref]
    means = {ref: fields["mean"] for ref, fields in content.items()}
    return AllocationEntry(digest=digest, path=path, means=means, measured=own, base=tuple(of_base))


def _allocation_place(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Sequence[ImportanceEntry]
) -> tuple[str, Path]:
    assert recipe.lewis is not None
    policy = [recipe.lewis.prune_by, recipe.lewis.density.model_dump(), recipe.lewis.importance.metric]
    models = [[files.ref, files.key] for files in (base, *experts)]
    passes = sorted([entry.ref, entry.calibration, entry.digest] for entry in measured)
    left_out = [sorted(recipe.exclude)] if recipe.exclude else []
    digest = store.digest([allocation.SEMANTICS, policy, models, passes, *left_out])
    return digest, store.home() / "allocations" / f"{digest}.json"


def wanted_measurements(recipe: Recipe) -> list[tuple[ModelEntry | None, list[str]]]:
    """(model, calibration sets) for each pass that the recipe needs; None is the base.

    The base's is needed for the difference of norms, and for `aim`, on every set that an expert has; the experts' not
    for `uniform` and `depth_gradient`, unless the recipe prunes by activation.
    """
    sets = list(dict.fromkeys(map(recipe.calibration_of, recipe.experts))) if recipe.measures_base else []
    own = [(entry, [recipe.calibration_of(entry)]) for entry in recipe.experts] if recipe.measures else []
    return [*([(None, sets)] if sets else []), *own]


def guide(
    recipe: Recipe,
    base: ModelFiles,
    experts: Sequence[ModelFiles],
    *,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[ImportanceEntry], AllocationEntry]:
    """Calibrate, measure and allocate, one after another: the library's way, without Prefect.

    Args:
        progress: called with (model, tokens done, tokens in all).
    """
    assert recipe.lewis is not None
    of_entry: Mapping[str, ModelFiles] = {e.model: f for e, f in zip(recipe.experts, experts, strict=True)}
    sets: dict[str, CalibrationEntry] = {}
    measured = []
    for entry, names in wanted_measurements(recipe):
        files = base if entry is None else of_entry[entry.model]
        sets |= {name: prepare_calibration(recipe, name, base) for name in names if name not in sets}
        report = None if progress is None else _labelled(progress, f"{files.ref} on {', '.join(names)}")
        own = [sets[name] for name in names]
        measured += measure(files, own, recipe.lewis.importance, device=device, progress=report)
    return measured, allocate(recipe, base, experts, measured)


def _labelled(progress: Callable[[str, int, int], None], label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)


def prepare_merge(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
    gpu: str = "cuda",
) -> Merge:
    """Open all models and check that they fit.

    Args:
        recipe: the recipe.
        base: the base, if there is one.
        experts: in the order of `recipe.experts`.
        allocated: densities, for a guided merge.
        which: `experts` for the guided densities, `uniform` for the baseline's.
        gpu: which one to compute on, if `lewis.devices.merge_device` says so.

    Raises:
        InputError: naming what does not fit.
    """
    densities = {ref: each.densities for ref, each in allocated.experts(which).items()} if allocated else {}
    scales = allocated.scales() if allocated else {}
    step = recipe.lewis.aim if recipe.lewis else None
    held_back = allocated.held_back(step.omega) if allocated and step else None
    opened = [
        Expert(entry, files.open(), densities.get(files.ref), scales.get(files.ref))
        for entry, files in zip(recipe.experts, experts, strict=True)
    ]
    opened_base = base.open() if base else None
    if recipe.measures and opened_base is not None:
        _check_token_ids(opened_base, [expert.model for expert in opened])
    return Merge(recipe, opened_base, opened, held_back, merge_device(gpu))


def _check_token_ids(base: Model, experts: Sequence[Model]) -> None:
    """A calibration set is the base's token ids, which have to mean the same to each expert."""
    for expert in experts:
        if other := clash(tokenizer_folder(base), tokenizer_folder(expert)):
            raise InputError(
                f"{expert.folder}: another vocabulary: {other}; importance is measured on the base's token ids, so "
                "this model cannot be guided: use density.strategy uniform and prune_by magnitude, or no lewis block"
            )


def merge(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
    progress: Callable[[int, int, str], None] | None = None,
    gpu: str = "cuda",
) -> MergedModel:
    """The merged checkpoint in the store, `merged/<digest>/`; made once, then found."""
    prepared = prepare_merge(recipe, base, experts, allocated, which, gpu)
    folder = _merged_folder(prepared.digest)
    with store.lock(f"merged-{prepared.digest}"):
        if find_merged(prepared.digest) is None:
            prepared.run(folder, manifest=lineage(recipe, base, experts, allocated), progress=progress)
    return MergedModel(digest=prepared.digest, folder=folder)


def find_merged(digest: str) -> MergedModel | None:
    """A merged checkpoint, if the store has it whole."""
    folder = _merged_folder(digest)
    whole = (store.read_manifest(folder) or {}).get("digest") == digest
    return MergedModel(digest=digest, folder=folder) if whole else None


def _merged_folder(digest: str) -> Path:
    return store.home() / "merged" / digest


def score(
    files: ModelFiles,
    settings: EvalSettings,
    *,
    root: Path,
    device: str = "cpu",
    progress: Callable[[float, str], None] | None = None,
) -> ScoresEntry:
    """Scores of one model; computed once for the model's content, the tasks and lm-eval's version, then found."""
    digest, path = _scores_place(files.key, settings, root, device)
    with store.lock(f"scores-{digest}"):
        if store.entry(path, "results") is None:
            found = lm_eval.evaluate(
                files.folder, settings, root=root, adapter=files.adapter, device=device, progress=progress
            )
            store.write_json(path, {"model": files.key, "ref": files.ref, **found.content})
    return ScoresEntry(ref=files.ref, digest=digest, path=path)


def find_scores(ref: str, key: str, settings: EvalSettings, root: Path, device: str = "cpu") -> ScoresEntry | None:
    """The scores of a model, if the store has them."""
    digest, path = _scores_place(key, settings, root, device)
    return None if store.entry(path, "results") is None else ScoresEntry(ref=ref, digest=digest, path=path)


def _scores_place(key: str, settings: EvalSettings, root: Path, device: str) -> tuple[str, Path]:
    digest = store.digest([key, lm_eval.tasks_digest(settings, root), precision(device)])
    return digest, store.home() / "scores" / f"{digest}.json"


def scored(recipe: Recipe, entries: Mapping[str, ScoresEntry]) -> list[Scored]:
    """The models of an evaluation side by side, with the recipe's weighted mean, in the order of the tables.

    Raises:
        InputError: if a weight is for a score that there is not.
    """
    weights = recipe.evaluate.weights if recipe.evaluate else {}
    return [Scored.of(label, entry.content("model"), entry.evaluated, weights) for label, entry in entries.items()]


def eval_settings(recipe: Recipe) -> EvalSettings:
    """The recipe's `evaluate` block as lm-eval settings."""
    block = recipe.evaluate
    assert block is not None
    return EvalSettings(
        tasks=block.tasks,
        limit=block.limit,
        num_fewshot=block.num_fewshot,
        batch_size=block.batch_size,
        timeout_s=60 * block.timeout_minutes,
        apply_chat_template=block.apply_chat_template,
        documents=block.documents,
        allow_code_execution=block.allow_code_execution,
    )


def short_names(refs: Sequence[str]) -> list[str]:
    """What to call experts in tables: the last part of each reference, or the whole where that would be ambiguous."""
    short = [ref.rpartition("+")[2].partition("@")[0].rstrip("/").rpartition("/")[2] or ref for ref in refs]
    taken = [*short, "base", "uniform", "lewis", "merged", "champion"]
    return [name if taken.count(name) == 1 else ref for name, ref in zip(short, refs, strict=True)]


def lineage(
    recipe: Recipe, base: ModelFiles | None, experts: Sequence[ModelFiles], allocated: AllocationEntry | None
) -> dict[str, object]:
    """What a merged model was made of, for its manifest."""
    inputs = {files.ref: files.key for files in ([base] if base else []) + list(experts)}
    means = allocated.means if allocated else None
    return {"method": recipe.merge_method, "inputs": inputs, "mean_density": means, "recipe": recipe.text}


def layers_of(base: ModelFiles) -> list[Layer]:
    """The covered layers of the base; logs which they are.

    Raises:
        InputError: if there are none.
    """
    opened = base.open()
    layers, tensors = _covered(base, opened), opened.tensors
    share = sum(x.parameters for x in layers) / sum(info.elements for info in tensors.values())
    kinds = ", ".join(sorted({layer.projection for layer in layers}))
    logger.info("covered: %d linear layers (%s), %.0f %% of the weights", len(layers), kinds, 100 * share)
    return layers


def _covered(base: ModelFiles, opened: Model) -> list[Layer]:
    """`importance.covered_layers`, found once: it builds the model's modules, which takes seconds to load."""
    place = place_of([importance.SEMANTICS, version("transformers"), base.key])
    known = store.entry(place, "layers")
    if known is None:
        known = [asdict(layer) for layer in importance.covered_layers(base.folder, opened.shapes)]
        store.write_json(place, {"layers": known})
    return [Layer(**fields) for fields in known]
