"""The child's side of `lewis.evaluation.harness`: lm-eval on one model, and what it says of each document.

`python -m lewis.evaluation.harness_child SOCKET [loaded]` is the nursery of `lewis.evaluation.fork_server`: it is
forked for each message on the socket, which brings standard input, standard output and the pipe of the keeper. The
request comes as one line of JSON on the standard input, which stays open: its end is the death of the parent.
"""

import importlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from lewis.store import write_json

HASH = 16  # hex digits of lm-eval's document hash that are kept: enough for one data set, a quarter of the disk
SMOKE_PROMPTS, SMOKE_TOKENS = 4, 128
ANSWERS = 64  # reference answers whose perplexity is measured
# What an evaluation loads, whatever the model; the last is what most of the time goes into.
LIBRARIES = ("lm_eval", "lm_eval.models.huggingface", "accelerate", "transformers.models.llama.modeling_llama")


def main(descriptor: str, loaded: str = "") -> None:
    """Fork a child for each message, until the socket is closed; then, in the child, answer the request."""
    with socket.socket(fileno=int(descriptor)) as messages:
        for name in LIBRARIES if loaded else ():
            if select.select([messages], [], [], 0)[0] and not messages.recv(1, socket.MSG_PEEK):
                return
            with suppress(ImportError):  # the child will say it
                importlib.import_module(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need nobody to wait for them
        while True:
            _, ends, _, _ = socket.recv_fds(messages, 1, 3)
            if not ends:
                return
            if os.fork() == 0:
                break
            for end in ends:
                os.close(end)
    _become_child(*ends)
    _answer()


def _become_child(stdin: int, stdout: int, status: int) -> None:
    """Return in a new process, while this one becomes its keeper."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        os.close(stdin)
        os.close(stdout)
        os.write(status, f"{os.getpid()}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, str(code).encode())
        os._exit(0)
    for end, place in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(end, place)
    for end in (stdin, stdout, status):
        os.close(end)


def _answer() -> None:
    """Read the request, evaluate, leave the result."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(request.pop("environment"))
    os.chdir(request.pop("cwd"))
    result = Path(request.pop("result"))
    write_json(result, evaluate(**request))


def _die_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def evaluate(
    *,
    include: str | None,
    defaults: bool,
    model_args: dict[str, Any],
    tasks: list[str],
    documents: str,
    limit: int | float | None,
    batch_size: int | str,
    device: str,
    **options: Any,
) -> dict[str, Any]:
    """Run `simple_evaluate`, keep what it found of each document, then try the guards' generations.

    Args:
        documents: `all`, or the half of every task's documents that `search` or `confirm` names.
        limit: documents per task, within that half.
        options: further arguments of `simple_evaluate`.

    Returns:
        plain data: lm-eval's `results`, `higher_is_better` and `n-shot`; `documents`, `samples` and `groups` as
        `lewis.evaluation.samples.read` takes them; `ends` as `lewis.evaluation.samples.Ends`.
    """
    from lm_eval import evaluator
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(include_path=include, include_defaults=defaults)
    loaded = _load(manager, tasks)
    manager.load = lambda _: loaded  # simple_evaluate would load the data a second time
    lm = get_model("hf").create_from_arg_obj(model_args, {"batch_size": batch_size, "device": device})
    chosen = None if documents == "all" else {n: _half(task, documents, limit) for n, task in loaded["tasks"].items()}
    vars(evaluator)["add_env_info"] = lambda _: None  # it has pip list all packages, which nobody reads
    found: Any = evaluator.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        log_samples=True,
        samples=chosen,
        limit=limit if chosen is None else None,
        **options,
    )
    assert found is not None  # None only on the other ranks of a distributed run
    kept = {key: value for key, value in found.items() if key in ("results", "higher_is_better", "n-shot")}
    rows = found["samples"]
    sampled = [_samples(name, rows[name], task) for name, task in loaded["tasks"].items()]
    kept["documents"] = {name: documents for name, documents, _ in sampled}
    kept["samples"] = [metric for _, _, metrics in sampled for metric in metrics]
    kept["groups"] = {name: _weights(group, found["results"]) for name, group in loaded["groups"].items()}
    kept["ends"] = _ends(lm, rows, loaded["tasks"])
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=_plain))
    return plain


def _load(manager: Any, tasks: list[str]) -> Any:
    """The tasks with their data.

    Raises:
        ValueError: naming the task whose YAML or data lm-eval cannot use; it names none itself.
    """
    try:
        return manager.load(tasks)
    except Exception:
        for name in tasks:
            try:
                manager.load([name])
            except Exception as error:
                told = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ValueError(f"task {name}: lm-eval cannot use its YAML file or its data: {told}") from error
        raise  # it takes all of them: a task that is in a group too


def _half(task: Any, documents: str, limit: int | float | None) -> list[int]:
    """Indices of the documents in one of two halves, which their hashes tell apart.

    Raises:
        ValueError: if it would be empty.
    """
    wanted = ("search", "confirm").index(documents)
    indices = [i for i, doc in enumerate(task.eval_docs) if int(_hash(doc), 16) % 2 == wanted]
    if limit is not None:
        indices = indices[: math.ceil(len(indices) * limit) if limit < 1 else int(limit)]
    if not indices:
        raise ValueError(f"{task.task_name}: too few documents to split: the half `{documents}` is empty")
    return indices


def _hash(doc: Any) -> str:
    """lm-eval's own hash of a document, shortened."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))[:HASH]


def _samples(name: str, rows: list[dict[str, Any]], task: Any) -> tuple[str, list[str], list[dict[str, Any]]]:
    """The documents of a task, and of each metric and filter a value per document, None where it has none."""
    by_filter: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:  # one for each document and filter
        by_filter.setdefault(row["filter"], {})[row["doc_id"]] = row
    first = next(iter(by_filter.values()), {})
    found = []
    for filter_, of_document in by_filter.items():
        metrics = dict.fromkeys(metric for row in of_document.values() for metric in row["metrics"])
        for metric in metrics:
            values = [_value(of_document.get(number, {}).get(metric)) for number in first]
            aggregation = _aggregation(task, metric)
            if aggregation and any(value is not None for value in values):
                key = f"{metric},{filter_}"
                found.append({"task": name, "metric": key, "aggregation": aggregation, "values": values})
    return name, [row["doc_hash"][:HASH] for row in first.values()], found


def _aggregation(task: Any, metric: str) -> str | None:
    """How the values of the documents become one, by name; None for a way that is no function of two sums."""
    from lm_eval.api import metrics

    known = {getattr(metrics, name): name for name in ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")}
    return known.get(task.aggregation().get(metric, metrics.mean))


def _value(value: Any) -> Any:
    """A number, or a pair (log-likelihood, weight); None for anything else."""
    if isinstance(value, list | tuple) and len(value) == 2:
        pair = [_value(each) for each in value]
        return None if None in pair else pair
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) else None


def _weights(group: Any, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """For each metric of a group, what each task counts in it: as `Group.aggregate` weights them."""
    found: dict[str, dict[str, float]] = {}
    members = [task.task_name for task in group.get_all_tasks()]
    for config in group.aggregate_metric_list or ():
        keys = [key for key in results[group.name] if key.partition(",")[0] == config.metric]
        for key in keys if config.aggregation == "mean" else ():
            having = [name for name in members if key in results.get(name, {})]
            sizes = {name: results[name]["sample_len"] if config.weight_by_size else 1 for name in having}
            found[key] = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    return found


def _ends(lm: Any, rows: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What the gate's guards look at; an `auto` batch size would be searched for anew for these few requests."""
    lm.batch_size_per_gpu = SMOKE_PROMPTS
    mixed = [pair for each in zip_longest(*_by_task(rows, tasks)) for pair in each if pair is not None]
    prompts = dict.fromkeys(row["arguments"][0][0] for _, row in mixed if len(row["arguments"][0]) > 1)
    ended = _smoke(lm, list(islice((prompt for prompt in prompts if prompt), SMOKE_PROMPTS)))
    return {
        "empty": {
            name: sum(not any(text.strip() for text in _texts(row["resps"])) for _, row in pairs) / len(pairs)
            for name, pairs in ((n, p) for n, p in zip(rows, _by_task(rows, tasks), strict=True))
            if pairs and tasks[name].OUTPUT_TYPE == "generate_until"
        },
        "tried": len(ended),
        "ended": sum(ended),
        "perplexity": _perplexity(lm, list(islice(_answers(mixed), ANSWERS))),
    }


def _by_task(rows: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any]) -> list[list[tuple[Any, Any]]]:
    """(task, row of a document) of each task; the first filter's rows stand for the documents."""
    return [[(tasks[n], row) for row in each if row["filter"] == each[0]["filter"]] for n, each in rows.items()]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _smoke(lm: Any, prompts: list[str]) -> list[bool]:
    """Whether a greedy generation from each prompt comes to its end token; a chat model is asked as in a chat."""
    import torch

    if not prompts:
        return []
    if getattr(lm.tokenizer, "chat_template", None):
        prompts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = min(SMOKE_TOKENS, lm.max_length // 2)
    ids, mask = lm.tok_batch_encode(prompts, left_truncate_len=lm.max_length - wanted)
    settings = lm.model.generation_config
    listed = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    stops = sorted({stop for stop in (*listed, lm.tokenizer.eos_token_id) if stop is not None})
    with torch.no_grad():
        made = lm.model.generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            max_new_tokens=wanted,
            do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id,
            eos_token_id=stops or None,
        )
    return [bool(set(stops) & set(row.tolist())) for row in made[:, ids.shape[1] :]]


def _answers(rows: list[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Prompt and reference answer of documents."""
    for task, row in rows:
        arguments, target = row["arguments"], row["target"]
        if task.OUTPUT_TYPE == "loglikelihood":
            yield arguments[0][0], arguments[0][1]
        elif task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int) and 0 <= target < len(arguments):
            yield arguments[target][0], arguments[target][1]
        elif task.OUTPUT_TYPE == "generate_until":
            answer = next(_texts(target), "")
            if answer.strip():
                yield arguments[0][0], f"{task.config.target_delimiter}{answer}"


def _perplexity(lm: Any, answers: list[tuple[str, str]]) -> float | None:
    """Perplexity per token over reference answers; None if there are none."""
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(answers)]
    tokens = sum(len(lm.tok_encode(answer, add_special_tokens=False)) for _, answer in answers)
    if not tokens:
        return None
    mean = sum(found[0] for found in lm.loglikelihood(requests, disable_tqdm=True)) / tokens
    return math.exp(-mean) if -mean < 700 else math.inf  # NaN stays NaN


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's; anything else, which is no score, as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


if __name__ == "__main__":
    main(*sys.argv[1:])
