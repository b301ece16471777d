"""What the gate's guards check beside the scores: empty answers, generations that end, perplexity.

It runs in the child of `lewis.evaluation.harness.process`, on the model and the tasks that lm-eval has loaded there.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import islice, zip_longest
from typing import Any

PROMPTS, TOKENS = 4, 128  # smoke generations, and the most new tokens of each
ANSWERS = 64  # reference answers whose perplexity is measured


def ends(lm: Any, rows: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `lewis.evaluation.samples.Ends`.

    Args:
        lm: lm-eval's model.
        rows: task -> lm-eval's sample of each document and filter.
        tasks: task -> lm-eval's task.
    """
    lm.batch_size_per_gpu = PROMPTS  # `auto` would search for a batch size again, for these few requests
    mixed = [pair for each in zip_longest(*_by_task(rows, tasks)) for pair in each if pair is not None]
    prompts = dict.fromkeys(row["arguments"][0][0] for _, row in mixed if len(row["arguments"][0]) > 1)
    smoke = _smoke if hasattr(lm, "model") and hasattr(lm.model, "generation_config") else _smoke_by_length
    ended = smoke(lm, list(islice((prompt for prompt in prompts if prompt), PROMPTS)))
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
    """For each task, (task, row) of each document; there is one row per filter, and the first filter's is taken."""
    return [[(tasks[n], row) for row in each if row["filter"] == each[0]["filter"]] for n, each in rows.items()]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _smoke(lm: Any, prompts: list[str]) -> list[bool]:
    """Whether a greedy generation from each prompt reaches an end token; a chat template is applied if there is one."""
    import torch

    if not prompts:
        return []
    if getattr(lm.tokenizer, "chat_template", None):
        prompts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = min(TOKENS, lm.max_length // 2)
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


def _smoke_by_length(lm: Any, prompts: list[str]) -> list[bool]:
    """As `_smoke`, for models of which only the text is known: it came to its end if it is shorter than it may be.

    Nothing is tried where there is no tokenizer to measure the text, as in chats with a server.
    """
    from lm_eval.api.instance import Instance

    if not prompts or getattr(lm, "tokenizer", None) is None:
        return []
    if getattr(lm.tokenizer, "chat_template", None):
        prompts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = min(TOKENS, lm.max_length // 2)
    settings = {"until": [], "max_gen_toks": wanted, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, dict(settings)), n) for n, prompt in enumerate(prompts)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    return [len(lm.tok_encode(text, add_special_tokens=False)) < wanted for text in texts]


def _answers(rows: list[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Prompt and reference answer of each document that has one."""
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

    if lm.tokenizer is None:  # a chat with a server, which tells no likelihood
        return None
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(answers)]
    tokens = sum(len(lm.tok_encode(answer, add_special_tokens=False)) for _, answer in answers)
    if not tokens:
        return None
    mean = sum(found[0] for found in lm.loglikelihood(requests, disable_tqdm=True)) / tokens
    return math.exp(-mean) if -mean < 700 else math.inf  # NaN stays NaN
