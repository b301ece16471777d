"""The model card: what a merge was made of, how good it is, and the licences of its parents."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lewis import store
from lewis.errors import InputError
from lewis.evaluation.statistics.scores import Score
from lewis.input_files import read_text
from lewis.models.broken import COMMIT
from lewis.models.source import commits_of
from lewis.recipe import yaml_text
from lewis.recipe.block import parts_of
from lewis.reports.markdown import block, code, markdown_table, plain

REPO = re.compile(r"[\w.-]+/[\w.-]+")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*", re.DOTALL)  # YAML that the Hub reads
RECIPE = "\n\n## Recipe\n\n"  # begins the last part of a card
NAME, HEAT_MAP, EVAL_RESULTS = store.CARD


def model_card(
    name: str,
    *,
    method: str,
    base: str | None,
    experts: Sequence[str],
    recipe: str,
    lineage: Mapping[str, str],
    mean_density: Mapping[str, float],
    strategy: str = "",
    anchor: str = "",
    fit: str = "",
    scores: Sequence[Mapping[str, object]],
    comparison: Sequence[Mapping[str, object]] = (),
    kept: Sequence[Mapping[str, object]] = (),
    results: Sequence[Score] = (),
    licences: Mapping[str, str | None] | None = None,
    adapter: str = "",
    datasets: Sequence[str] = (),
) -> str:
    """Return the README of a merged model as Markdown, with YAML front matter for the Hub.

    Args:
        base, experts: references in the recipe; those on the Hub become `base_model`.
        lineage: reference -> commit or content digest.
        mean_density: expert -> mean density; empty for a plain merge.
        strategy: how the densities were allocated; empty for a plain merge.
        anchor: the method whose merge the fit was pulled towards; empty if the recipe has no block `anchor`.
        fit: what `ridge: auto` chose and what held-back rows say of the fit, as a sentence; else empty.
        scores: rows of `lewis.evaluation.statistics.scores.score_table`; empty if nothing was scored.
        comparison: rows of `lewis.evaluation.statistics.scored.comparison_rows`.
        kept: rows of `lewis.evaluation.statistics.retained_gain.kept_rows`.
        results: the merged model's own scores, for the Hub's `model-index`.
        licences: reference -> what `licence_of` returned for that parent.
        adapter: if the merge is a LoRA adapter on the base, what it holds and its error, in one line; else empty.
        datasets: repos on the Hub that the calibration rows are from.
    """
    parents = [*([base] if base else []), *experts]
    repos = dict.fromkeys(repo for ref in parents if (repo := _repo(ref, lineage.get(ref, ""))))
    relation = "merge"
    if adapter:  # the Hub shows an adapter under its base alone
        relation, own = "adapter", _repo(base, lineage.get(base, "")) if base else None
        repos = dict.fromkeys([own] if own else [])
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        **_common_licence(licences or {}),
        **({"base_model": list(repos), "base_model_relation": relation} if repos else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["merge", "lewis", method])),
        **({"model-index": _model_index(name, results)} if results else {}),
    }
    allocator = "[LEWIS](https://arxiv.org/abs/2503.03874)" if strategy == "lewis" else strategy
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {plain(name)}",
        f"A merge of {len(experts)} expert{'s' * (len(experts) != 1)} by `{method}`"
        f"{f', pulled towards a merge by `{anchor}`' if anchor else ''}"
        f"{f', with {allocator} densities' if strategy else ''}"
        f"{', as a LoRA adapter on the base' * bool(adapter)}.",
        f"The fit: {fit}." if fit else "",
        _adapter(adapter, base or "", lineage) if adapter else "",
        "## Scores\n\n" + markdown_table(scores) if scores else "",
        "## What is kept of each expert's gain\n\n" + markdown_table(kept) if kept else "",
        "## Compared, document by document\n\n" + markdown_table(comparison) if comparison else "",
        "## Density per layer\n\n![Fraction of each task vector that is kept](density.png)" if mean_density else "",
        "## Inputs\n\n" + markdown_table(_inputs(parents, lineage, mean_density)),
        _licences(licences or {}),
    ]
    return "\n\n".join(part for part in parts if part) + f"{RECIPE}{block(recipe.strip(), 'yaml')}\n"


def _adapter(adapter: str, base: str, lineage: Mapping[str, str]) -> str:
    """Return the card's section on an adapter: what it holds, its error and its base."""
    at = f" at {code(lineage[base])}" if base in lineage else ""
    return (
        f"## The adapter\n\n{adapter}. The error is the Frobenius norm of what is left out of the merged delta, "
        f"relative to the delta's. It sits on {code(base.partition('@')[0])}{at}: open it with PEFT, such as "
        "`AutoPeftModelForCausalLM.from_pretrained`."
    )


def _model_index(name: str, results: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores in the form of the Hub's `model-index`."""
    entries = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task, "type": task},
            "metrics": [
                {"type": s.metric.partition(",")[0], "name": s.metric, "value": s.value}
                for s in results
                if s.task == task
            ],
        }
        for task in dict.fromkeys(s.task for s in results)
    ]
    return [{"name": name, "results": entries}]


def _inputs(
    parents: Iterable[str], lineage: Mapping[str, str], mean_density: Mapping[str, float]
) -> list[dict[str, object]]:
    others = [ref for ref in lineage if ref not in set(parents)]  # calibration sets
    rows: list[dict[str, object]] = []
    for ref in [*dict.fromkeys(parents), *others]:
        density = f"{mean_density[ref]:.3f}" if ref in mean_density else ""
        commit = code(lineage.get(ref, "?"))
        rows.append({"input": code(ref), "commit or digest": commit, "mean density": density})
    return rows


def _repo(ref: str, commit: str) -> str | None:
    """The Hub's name of a model; None for a local folder, whose lineage is a digest and longer than a commit."""
    repo = parts_of(ref)[-1].partition("@")[0]
    return repo if REPO.fullmatch(repo) and COMMIT.fullmatch(commits_of(commit)[-1]) else None


def write(folder: Path, text: str, heat_map: bytes | None = None, eval_results: str = "") -> None:
    """Write a card, and the picture of the densities that it shows, into a model's folder.

    Args:
        folder: of the model.
        text: the card, Markdown.
        heat_map: PNG file; None: an existing picture stays.
        eval_results: YAML with scores that the Hub reads next to the card; empty: an existing file is removed.
    """
    if eval_results:
        store.write_text(folder / EVAL_RESULTS, eval_results)
    else:
        (folder / EVAL_RESULTS).unlink(missing_ok=True)
    if heat_map is not None:
        store.write_bytes(folder / HEAT_MAP, heat_map)
    store.write_text(folder / NAME, text)


def front_matter(folder: Path) -> dict[str, Any]:
    """Return the YAML at the top of a folder's model card; empty if there is no card, or it cannot be read."""
    try:
        found = FRONT_MATTER.match(read_text(folder / NAME, yaml_text.MAX_BYTES))
        stated = yaml_text.load(found[1], NAME) if found else None
    except (OSError, InputError):
        return {}
    return stated if isinstance(stated, dict) else {}


def licence_of(folder: Path) -> str | None:
    """Return the licence that a folder's model card states, with its link if there is one; None if it states none."""
    stated = front_matter(folder)
    name = stated.get("license")
    if not isinstance(name, str):
        return None
    if name == "other" and stated.get("license_name"):
        name = str(stated["license_name"])
    return f"{name} ({stated['license_link']})" if stated.get("license_link") else name


def _licences(licences: Mapping[str, str | None]) -> str:
    if not licences:
        return ""
    rows = [{"parent": code(ref), "licence": name or "none stated"} for ref, name in licences.items()]
    note = "As the parents' model cards state them. The terms of all of them apply to this model."
    silent = [code(ref) for ref, name in licences.items() if name is None]
    if silent:
        note += f" Ask the authors of {', '.join(silent)} before you share it."
    return f"## Licences of the parents\n\n{markdown_table(rows)}\n\n{note}"


def _common_licence(licences: Mapping[str, str | None]) -> dict[str, str]:
    """The Hub's `license`, if all parents state the same."""
    names = set(licences.values())
    name = names.pop() if len(names) == 1 else None
    return {"license": name} if name and re.fullmatch(r"[a-z0-9.-]+", name) else {}
