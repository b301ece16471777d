"""The child of `lewis.evaluation.harness.process`: runs lm-eval on one model and keeps the value of each document."""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from lewis.evaluation.harness import loaded_model
from lewis.evaluation.harness.answer_texts import of_first_filter, texts_of
from lewis.evaluation.harness.kept_answers import KeptAnswers
from lewis.evaluation.harness.kept_requests import add_answers, requests_of
from lewis.evaluation.statistics.scores import HASH
from lewis.models.hub.client import repeated, resume_downloads
from lewis.rehearsal.untrusted import functions_refused, no_package_list, sandboxed_templates
from lewis.rehearsal.values import aggregation_of, plain_value
from lewis.store import write_json

_HALVES = ("search", "confirm")
_COMMIT = re.compile("[0-9a-f]{40}")


def answer() -> None:
    """Read the request, evaluate, write the result file."""
    request = json.loads(sys.stdin.buffer.readline())
    os.environ.clear()
    os.environ.update(request.pop("environment"))
    os.chdir(request.pop("cwd"))
    result = Path(request.pop("result"))
    with ExitStack() as held:
        held.enter_context(sandboxed_templates())
        held.enter_context(no_package_list())
        if not request["confirm_run_unsafe_code"]:
            held.enter_context(functions_refused())
        write_json(result, evaluate(**request))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to take down the interpreter would copy most of the memory that the fork shares


def evaluate(
    *,
    include: list[str],
    model: str,
    model_args: dict[str, Any],
    tasks: list[str],
    documents: str,
    seed: str,
    look: int | None,
    limit: int | float | None,
    batch_size: int | str,
    device: str | None,
    answers: str | None,
    to_serve: bool,
    **options: Any,
) -> dict[str, Any]:
    """Run `simple_evaluate`, keep the value of each document, then measure what the gate's guards check.

    Args:
        include: folders of the files of all tasks; a name that two of them define counts as in the last.
        model, model_args, device: as `lewis.evaluation.harness.backends.HarnessModel`.
        tasks: names.
        documents: `all`; one half of every task's documents, `search` or `confirm`; or those that `seed` draws,
            `by_release`.
        limit: documents per task, within that half.
        look: how many of these are scored, drawn at random; None: all.
        answers: the file of `KeptAnswers`; None: nothing is kept.
        to_serve: whether the model may be served: then some requests are kept with its answers, to check its server by.
        options: further arguments of `simple_evaluate`.

    Returns:
        plain data: lm-eval's `results`, `higher_is_better`, `n-shot` and `versions`; `documents`, `samples` and
        `groups` as `read_samples` in `lewis.evaluation.statistics.scores` takes them; `ends` as `Ends` there;
        `prompts`, task -> a hash of the prompt of each document;
        `texts` as `texts_of`; `requests`, of a model to serve, as `requests_of`;
        `sources`, task -> repo (`path`), `config_name`, `split` and `revision` of documents from the Hub; with a look,
        `pools`, task -> how many documents it would have without.
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(include_path=include, include_defaults=False)
    loaded = _load(manager, tasks)
    manager.load = lambda _: loaded  # else simple_evaluate loads the data again
    lm = loaded_model.open_model(model, model_args, batch_size, device)
    chats = loaded_model.record_chats(lm) if to_serve else {}
    drawn, pools = _part(loaded["tasks"], documents, limit, seed, look) if documents != "all" or look else ({}, {})
    kept_answers = KeptAnswers(Path(answers)) if answers else None
    with kept_answers.used_by(lm) if kept_answers else nullcontext():
        try:
            found: Any = evaluator.simple_evaluate(
                model=lm,
                tasks=tasks,
                task_manager=manager,
                log_samples=True,
                samples={name: sorted(indices) for name, indices in drawn.items()} or None,
                limit=None if drawn else limit,
                **options,
            )
        except AssertionError as error:
            raise (_empty_answer(loaded["tasks"]) or error) from error
        assert found is not None  # None only on the other ranks of a distributed run
        rows = found["samples"]
        for name, indices in drawn.items():
            rows[name] = _as_drawn(rows[name], indices)
        ends = loaded_model.measure_ends(lm, rows, loaded["tasks"], kept_answers)
    kept = {key: value for key, value in found.items() if key in ("results", "higher_is_better", "n-shot", "versions")}
    sampled = [_samples(name, rows[name], task) for name, task in loaded["tasks"].items()]
    kept["documents"] = {name: documents for name, documents, _ in sampled}
    kept["samples"] = [metric for _, _, metrics in sampled for metric in metrics]
    kept["prompts"] = {name: [row["prompt_hash"][:HASH] for row in of_first_filter(own)] for name, own in rows.items()}
    kept["texts"] = texts_of(rows, loaded["tasks"])
    sources = {name: _source(task) for name, task in loaded["tasks"].items()}
    kept["sources"] = {name: source for name, source in sources.items() if source}
    kept["groups"] = {name: _weights(group, found["results"]) for name, group in loaded["groups"].items()}
    kept |= {"ends": ends} | ({"pools": pools} if look else {})
    if to_serve:
        kept["requests"] = requests_of(rows, loaded["tasks"], chats)
        add_answers(lm, kept["requests"])
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=_plain))
    return plain


def _empty_answer(tasks: Mapping[str, Any]) -> ValueError | None:
    """The error for the first document with an answer or a choice that is empty, which has no likelihood."""
    for name, task in tasks.items():
        for request in getattr(task, "instances", ()):
            if request.request_type == "loglikelihood" and not request.args[1]:
                return ValueError(f"task {name}: row {request.doc_id + 1} of its data has an empty answer or choice")
    return None


def _part(
    tasks: dict[str, Any], documents: str, limit: int | float | None, seed: str, look: int | None
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Task -> indices of the documents to score, as they are drawn; and task -> how many there are without a look."""
    drawn, pools = dict[str, list[int]](), dict[str, int]()
    for name, task in tasks.items():
        hashes = [_hash(doc) for doc in task.eval_docs]
        pool = _pool(name, hashes, documents, limit, seed)
        drawn[name], pools[name] = _drawn(hashes, pool, "", look) if look else pool, len(pool)
    return drawn, pools


def _as_drawn(rows: list[Any], indices: list[int]) -> list[Any]:
    """The rows in the order in which documents are drawn, so that the first rows are in every look."""
    places = {index: place for place, index in enumerate(indices)}
    return sorted(rows, key=lambda row: places[row["doc_id"]])


def _load(manager: Any, tasks: list[str]) -> Any:
    """Load the tasks with their data, whose download from the Hub is retried and resumed as that of a model is."""
    resume_downloads()
    try:
        return repeated("the data of the tasks", lambda: manager.load(tasks))
    except Exception:
        for name in tasks:
            try:
                manager.load([name])
            except Exception as error:
                why = error.__cause__ or error  # `datasets` says only that an error occurred, from the error itself
                problem = f"{type(why).__name__}: {why}".partition("\n")[0]
                raise ValueError(f"task {name}: lm-eval cannot use its YAML file or its data: {problem}") from error
        raise  # each loads alone, so together they clash: such as a task and its group


def _source(task: Any) -> dict[str, str | None] | None:
    """The dataset of the Hub, with its commit, that a task's documents come from; None if that is not known."""
    config = task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    with suppress(AttributeError, KeyError, TypeError):  # a task may hold its documents in other ways
        for file in task.dataset[split].cache_files:
            commit = Path(file["filename"]).parent.name  # `datasets` keeps what it has read in a folder of this name
            if _COMMIT.fullmatch(commit) and "/" in config.dataset_path:
                name = config.dataset_name
                return {"path": config.dataset_path, "config_name": name, "split": split, "revision": commit}
    return None


def _pool(name: str, hashes: list[str], documents: str, limit: int | float | None, seed: str) -> list[int]:
    """Indices of the documents that may be scored, in the order in which they are drawn; `hashes`: of all documents."""
    indices = list(range(len(hashes)))
    if documents in _HALVES:
        wanted = _HALVES.index(documents)
        indices = [i for i in indices if int(hashes[i], 16) % 2 == wanted]
    count = len(indices) if limit is None else math.ceil(len(indices) * limit) if limit < 1 else int(limit)
    indices = _drawn(hashes, indices, seed, count) if documents == "by_release" else indices[:count]
    if not indices:
        half = f"too few documents to split: the half `{documents}` is empty"
        raise ValueError(f"{name}: {half if documents in _HALVES else 'it has no documents'}")
    return indices


def _drawn(hashes: list[str], indices: list[int], seed: str, count: int) -> list[int]:
    """The first `count` indices, in the order of the documents' hashes, hashed again together with a seed."""
    places = {i: (hashlib.sha256(f"{seed} {hashes[i]}".encode()).hexdigest(), i) for i in indices}
    return sorted(indices, key=places.__getitem__)[:count]


def _hash(doc: Any) -> str:
    """lm-eval's own hash of a document, shortened."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))[:HASH]


def _samples(name: str, rows: list[dict[str, Any]], task: Any) -> tuple[str, list[str], list[dict[str, Any]]]:
    """A task's name, its documents' hashes, and one value (or None) per document for each metric and filter."""
    by_filter: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:  # one row per document and filter
        by_filter.setdefault(row["filter"], {})[row["doc_id"]] = row
    first = next(iter(by_filter.values()), {})
    found = []
    for filter_, of_document in by_filter.items():
        metrics = dict.fromkeys(metric for row in of_document.values() for metric in row["metrics"])
        for metric in metrics:
            values = [plain_value(of_document.get(number, {}).get(metric)) for number in first]
            aggregation = aggregation_of(task, metric)
            if aggregation and any(value is not None for value in values):
                key = f"{metric},{filter_}"
                found.append({"task": name, "metric": key, "aggregation": aggregation, "values": values})
    return name, [row["doc_hash"][:HASH] for row in first.values()], found


def _weights(group: Any, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """For each metric of a group, the weight of each task, as in lm-eval's `Group.aggregate`."""
    found: dict[str, dict[str, float]] = {}
    members = [task.task_name for task in group.get_all_tasks()]
    for config in group.aggregate_metric_list or ():
        keys = [key for key in results[group.name] if key.partition(",")[0] == config.metric]
        for key in keys if config.aggregation == "mean" else ():
            having = [name for name in members if key in results.get(name, {})]
            sizes = {name: results[name]["sample_len"] if config.weight_by_size else 1 for name in having}
            found[key] = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    return found


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number; anything else, which is no score, as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)
