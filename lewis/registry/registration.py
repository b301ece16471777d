"""Collect what is registered in MLflow about a merged model: parameters, scores, lineage, pictures and the card."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.evaluation.documents import SideBySide, side_by_side
from lewis.evaluation.hub_results import hub_results
from lewis.evaluation.statistics.retained_gain import Kept, kept_gains, kept_rows
from lewis.evaluation.statistics.scored import MERGED, Scored, comparison_rows, gain, scores_of
from lewis.evaluation.statistics.scores import score_table
from lewis.evaluation.step import ModelScores, scored_models
from lewis.importance.step import CalibrationEntry
from lewis.merging.run import Written
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import CalibrationSet
from lewis.registry import tracking, versions
from lewis.registry.lineage import lineage_of
from lewis.registry.tracking import RunInput
from lewis.reports import card, charts
from lewis.reports.side_by_side import answer_rows

DIGEST = 32  # characters of a dataset's digest; MLflow takes 36


@dataclass(frozen=True)
class Registration:
    """What is registered in MLflow about a merged model.

    Attributes:
        name: of the registered model.
        folder: the merged checkpoint as `store.publish` wrote it; its files never change afterwards.
        digest: of the merge, 64 hex digits; it identifies the version.
        params: the recipe, flat: `a.b.0.c` -> value.
        metrics: such as `{"merged/gsm8k/exact_match,none": 0.5, "base/...": ...}`. Those of `merged` are also kept in
            the version's `version.json`.
        lineage: reference in the recipe -> commit or content digest, of every input.
        recipe: its YAML text.
        pictures: file name -> PNG.
        tables: name -> rows.
        card: the model card, Markdown, which becomes the version's description.
        tags: further tags of a new version, such as the flow run that made it.
        documents: name of a metric -> task and digest of the documents that it was measured on.
        datasets: the documents of the evaluation and the calibration sets, as inputs of the run.
        base: if `folder` holds an adapter, the folder of its base model; else None.
        source: name of the recipe's file, which MLflow shows as the source of the run.
        began: when the work on the merge began, as Unix time in seconds; None: when it is registered.
        eval_results: the scores as YAML for the Hub; empty if it would compare none of them.
        team: `register.team` of the recipe.
        beside: the answers of the merged model and of the model that the gate compares it with; None without one.
    """

    name: str
    folder: Path
    digest: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    lineage: Mapping[str, str]
    recipe: str
    pictures: Mapping[str, bytes]
    tables: Mapping[str, list[dict[str, Any]]]
    card: str
    tags: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    datasets: Sequence[RunInput] = ()
    base: Path | None = None
    source: str = ""
    began: float | None = None
    eval_results: str = ""
    team: str = ""
    beside: SideBySide | None = None


def registration_of(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    calibrations: Sequence[CalibrationEntry],
    allocated: AllocationEntry | None,
    merged: MergedModel,
    scores: Mapping[str, ModelScores],
    tags: Mapping[str, str] | None = None,
    began: float | None = None,
) -> Registration:
    """Collect parameters, scores, lineage and pictures of one merge.

    Args:
        recipe: with a `register` block.
        base, experts, calibrations: the inputs of the merge.
        allocated: densities; None for a plain merge.
        merged: the result of the merge.
        scores: label in the score table -> scores.
        tags: further tags of the version.
        began: as in `Registration`.
    """
    assert recipe.register_as is not None
    models = scored_models(recipe.score_weights, scores)
    found = scores_of(models)
    rows = score_table(found)
    comparison = comparison_rows(models) if models else []
    kept = kept_gains(recipe.gate_metric, models)
    lineage = lineage_of(base, experts, calibrations)
    means = dict(allocated.means) if allocated else {}
    drawn: dict[str, bytes] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    beside = side_by_side(recipe.gate_metric, models)
    if allocated:
        drawn[card.HEAT_MAP] = charts.densities(allocated)
        tables["densities"] = [
            {"expert": ref, "tensor": tensor, "density": density}
            for ref, each in allocated.experts().items()
            for tensor, density in each.densities.items()
        ]
    if found:
        drawn["scores.png"] = charts.scores(recipe.score_weights, scores)
        tables |= {"scores": rows, "comparison": comparison, **({"kept": kept_rows(kept)} if kept else {})}
        tables |= {"answers": answers} if beside and (answers := answer_rows(beside)) else {}
    metrics = {f"{label}/{s.task}/{s.metric}": s.value for label, each in found.items() for s in each}
    metrics |= _gains(models) | _kept(kept)
    sources = scores[MERGED].sources if MERGED in scores else {}
    part = scores[MERGED].part if MERGED in scores else ""
    documents = _documents(models, metrics)
    parts = _parts(models[-1], scores[MERGED].pools) if part else {}
    own, adapter = dict(tags or {}) | ({tracking.PART: part} if part else {}), merged.adapter
    if adapter:
        metrics |= {"adapter/error": adapter.error, "adapter/worst error": adapter.worst_error}
        own["lewis.adapter"] = adapter.to_text()
    return Registration(
        name=recipe.register_as.model,
        folder=merged.folder,
        digest=merged.digest,
        params=flat_parameters(recipe) | {f"mean_density/{ref}": f"{mean:.6f}" for ref, mean in means.items()},
        metrics=metrics,
        lineage=lineage,
        recipe=recipe.public_text,
        pictures=drawn,
        tables=tables,
        card=model_card(
            recipe, base, experts, lineage, means, models, merged.fit, adapter.to_text() if adapter else ""
        ),
        tags=own,
        documents=documents,
        datasets=_inputs(recipe, documents, sources, calibrations, parts),
        base=merged.base,
        source=f"{recipe.name}.yaml",
        began=began,
        eval_results=hub_results(
            recipe.evaluate,
            recipe.root,
            recipe.gate_metric,
            found.get(MERGED, ()),
            {task: str(each["revision"]) for task, each in sources.items()},
            versions.public_page(recipe.register_as.model),
            part,
            scores[MERGED].shots if MERGED in scores else {},
        ),
        team=recipe.register_as.team,
        beside=beside,
    )


def _documents(models: Sequence[Scored], metrics: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map each metric to its task and the digest of its documents, where known; all models have the same documents."""
    known = {
        f"/{samples.key}": (samples.task, store.digest([part.documents for part in samples.parts])[:DIGEST])
        for samples in (models[-1].samples if models else ())
    }
    ends = {name: [key for key in known if name.endswith(key)] for name in metrics}
    return {name: known[max(found, key=len)] for name, found in ends.items() if found}


def _parts(model: Scored, pools: Mapping[str, int]) -> dict[str, str]:
    """Return the part of its documents that each task was scored on, such as `64 of 1319`, for tasks with more."""
    found = {}
    for each in model.samples:
        scored = sum(len(part.documents) for part in each.parts)
        pool = sum(pools.get(part.task, len(part.documents)) for part in each.parts)
        if scored < pool:
            found[each.task] = f"{scored} of {pool}"
    return found


def _inputs(
    recipe: Recipe,
    documents: Mapping[str, tuple[str, str]],
    sources: Mapping[str, Mapping[str, Any]],
    calibrations: Sequence[CalibrationEntry],
    parts: Mapping[str, str],
) -> list[RunInput]:
    """Return the inputs of the run: the evaluation documents and the calibration sets, each with its source."""
    found = []
    for task, digest in sorted(set(documents.values())):
        kind, source = ("hugging_face", sources[task]) if task in sources else ("lm-eval", {"lm_eval_task": task})
        found.append(RunInput(task, digest, "evaluation", kind, source, parts.get(task, "")))
    sets = recipe.lewis.calibrations if recipe.lewis else {}
    for each in calibrations:
        kind, source = _source_of(sets[each.name])
        found.append(RunInput(each.name, each.digest[:DIGEST], "calibration", kind, source))
    return found


def _source_of(rows: CalibrationSet) -> tuple[str, dict[str, Any]]:
    if rows.dataset is None:
        return "texts", {"texts": len(rows.texts or ())}
    path, _, revision = rows.dataset.partition("@")
    if not card.REPO.fullmatch(path):
        return "files", {"format": path, "data_files": rows.data_files}
    return "hugging_face", {
        "path": path,
        "config_name": rows.config,
        "split": rows.split,
        "data_files": rows.data_files,
        "revision": revision or None,
    }


def model_card(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    lineage: Mapping[str, str],
    means: Mapping[str, float],
    models: Sequence[Scored] = (),
    fit: str = "",
    adapter: str = "",
) -> str:
    """Return the model card of one merge as Markdown.

    Args:
        lineage: as `lineage_of` returns it.
        means: expert -> mean density; empty for a plain merge.
        models: everything that was scored, the merged model last.
        fit: a sentence about the fit; empty if there is nothing to say.
        adapter: if the merge is an adapter, what it holds and its error, in one line; else empty.
    """
    found, parents = scores_of(models), [*([base] if base else []), *experts]
    return card.model_card(
        recipe.register_as.model if recipe.register_as else recipe.name,
        method=recipe.merge_method,
        base=base.ref if base else None,
        experts=[files.ref for files in experts],
        recipe=recipe.public_text,
        lineage=lineage,
        mean_density=means,
        strategy=recipe.allocator.density.strategy if recipe.allocator else "",
        anchor=recipe.anchor.merge_method if recipe.anchor else "",
        fit=fit,
        scores=score_table(found),
        comparison=comparison_rows(models) if models else [],
        kept=kept_rows(kept_gains(recipe.gate_metric, models)),
        results=found.get(MERGED, ()),
        licences={files.ref: card.licence_of(files.adapter or files.folder) for files in parents},
        adapter=adapter,
        datasets=_datasets(recipe),
    )


def _datasets(recipe: Recipe) -> list[str]:
    """Return the Hub repos that the calibration rows of a recipe come from."""
    sets = recipe.lewis.calibrations.values() if recipe.lewis else ()
    repos = [(each.dataset or "").partition("@")[0] for each in sets]
    return [repo for repo in repos if card.REPO.fullmatch(repo)]


def write_card(
    written: Written,
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None,
) -> None:
    """Write the card of a merge that was not scored, with the picture of its densities, into the merge's folder."""
    means = dict(allocated.means) if allocated else {}
    adapter = written.adapter.to_text() if written.adapter else ""
    text = model_card(recipe, base, experts, lineage_of(base, experts, ()), means, fit=written.fit, adapter=adapter)
    card.write(written.folder, text, charts.densities(allocated) if allocated else None)


def _gains(models: Sequence[Scored]) -> dict[str, float]:
    """Return the merged model's gain over each other model, with the ends of its interval, as metrics."""
    found: dict[str, float] = {}
    for model in models[:-1]:
        for key in models[-1].by_name:
            if (each := gain(models[-1], model, key)) is not None:
                named = {"": each.delta, " low": each.low, " high": each.high}
                found |= {f"gain on {model.label}{end}/{key}": v for end, v in named.items() if math.isfinite(v)}
    return found


def _kept(kept: Sequence[Kept]) -> dict[str, float]:
    """Return the fraction of each expert's gain that the merged model and the baselines keep, as metrics."""
    found: dict[str, float] = {}
    for each in kept:
        fractions = {"kept": each.fraction} | {f"kept by {label}": value for label, value in each.baselines.items()}
        found |= {f"{name}/{each.best.task}": value for name, value in fractions.items() if math.isfinite(value)}
    return found


def flat_parameters(recipe: Recipe) -> dict[str, str]:
    """Return the recipe as flat parameters, `a.b.0.c` -> value, without default values and the block `serve`."""

    def walk(value: Any, path: str) -> dict[str, str]:
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)  # type: ignore[assignment]
        else:
            return {} if value is None else {path: str(value)}
        return {key: text for name, each in items for key, text in walk(each, f"{path}.{name}".strip(".")).items()}

    return walk(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"serve"}), "")
