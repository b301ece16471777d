"""Read results that lm-eval itself wrote: a folder with `results_*.json` and, by `--log_samples`, `samples_*.jsonl`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.evaluation.statistics.scores import HASH, Evaluated, read_samples
from lewis.input_files import open_regular, read_json
from lewis.rehearsal.values import SUMMED, plain_value

MOST = 1 << 30  # bytes of a file
_DEFAULT = {  # lm-eval's, for metrics that a task does not list
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
_NO_ENDS = {"empty": {}, "tried": 0, "ended": 0, "perplexity": None}


def holds_results(folder: Path) -> bool:
    """Whether lm-eval wrote results into a folder, or a folder in it."""
    return folder.is_dir() and any(folder.rglob("results_*.json"))


def read_results(folder: Path) -> Evaluated:
    """The scores and samples of the newest results in a folder that lm-eval wrote to (`--output_path`).

    Metrics whose value is not a function of two sums over the documents have no samples. Groups are left out.

    Raises:
        InputError: if there are no results, results of several models, or no samples; or a file is damaged.
    """
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise InputError(
            f"{folder}: expected a folder that lm-eval wrote (--output_path), but it has no results_*.json"
        )
    if len(parents := sorted({file.parent for file in files})) > 1:
        raise InputError(f"{folder}: it has the results of several models; give one of {', '.join(map(str, parents))}")
    date = files[-1].stem.removeprefix("results_")
    paths = {
        path.name.removeprefix("samples_").removesuffix(f"_{date}.jsonl"): path
        for path in sorted(files[-1].parent.glob(f"samples_*_{date}.jsonl"))
    }
    if not paths:
        raise InputError(f"{files[-1]}: there are no samples_*_{date}.jsonl next to it; run lm-eval with --log_samples")
    try:
        return _evaluated(str(folder), read_json(files[-1], MOST), {task: _rows(path) for task, path in paths.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{files[-1]}: not results and samples of lm-eval: {type(error).__name__}: {error}") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    with open_regular(path) as file:
        try:
            return [json.loads(line) for line in file if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def _evaluated(name: str, found: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]]) -> Evaluated:
    content: dict[str, Any] = {"results": {}, "documents": {}, "samples": [], "groups": {}, "ends": _NO_ENDS}
    content["prompts"] = {}
    content |= {key: dict(found.get(key) or {}) for key in ("higher_is_better", "n-shot", "versions")}
    for task, of_task in rows.items():
        first = {row["doc_id"]: row for row in of_task if row.get("filter") == of_task[0].get("filter")}
        content["results"][task] = {"sample_len": len(first), **found["results"][task]}
        content["documents"][task] = [str(row["doc_hash"])[:HASH] for row in first.values()]
        if all("prompt_hash" in row for row in first.values()):
            content["prompts"][task] = [str(row["prompt_hash"]) for row in first.values()]
        listed = (found.get("configs") or {}).get(task, {}).get("metric_list") or ()
        aggregations = _DEFAULT | {each["metric"]: each["aggregation"] for each in listed if each.get("aggregation")}
        for key, value in found["results"][task].items():
            metric, comma, filter_ = key.partition(",")
            aggregation = aggregations.get(metric, "mean")
            if not comma or metric.endswith("_stderr") or aggregation not in SUMMED:
                continue
            own = {row["doc_id"]: row for row in of_task if row.get("filter", "none") == filter_}
            values = [plain_value(own.get(number, {}).get(metric)) for number in first]
            if all(each is None for each in values):
                continue
            sample = {"task": task, "metric": key, "aggregation": aggregation, "values": values}
            [samples] = read_samples({"documents": content["documents"], "samples": [sample], "groups": {}})
            if math.isclose(samples.value(), value, rel_tol=1e-6, abs_tol=1e-9):  # else it is aggregated in another way
                content["samples"].append(sample)
    return Evaluated.of(name, content)
