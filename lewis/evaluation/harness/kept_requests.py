"""Keep a model's requests and answers for a few documents in full, so that its server can be asked the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from lewis.evaluation.harness.answer_texts import of_first_filter, texts_in
from lewis.evaluation.harness.loaded_model import greedy_continuations
from lewis.redact import redacted

DOCUMENTS = 32  # of one evaluation; its tasks have equal shares
TOKENS = 16  # of the greedy answers that are made for documents with choices
LONGEST = 20_000  # characters of a prompt


def requests_of(
    rows: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any], chats: Mapping[str, list[dict[str, str]]]
) -> dict[str, list[dict[str, Any]]]:
    """Task -> requests about some of its documents, which are the same for all models: those with the smallest hashes.

    Args:
        rows: task -> lm-eval's sample of each document and filter.
        tasks: task -> lm-eval's task.
        chats: prompt -> the messages from which the chat template made it.

    Returns:
        `document`, its hash; `prompt`, and `messages` where a chat template was applied; the greedy `answer` with the
        texts that end it, `until`, and the most tokens that it may have, `tokens`; or `choices` and their `likelihoods`
        (natural logarithms), whose answer `add_answers` makes. Documents with passwords in them are left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, of_task in rows.items():
        ask = _ASKED.get(tasks[name].OUTPUT_TYPE)
        own = of_first_filter(of_task) if ask else []
        most, kept = max(1, DOCUMENTS // len(rows)), list[dict[str, Any]]()
        for row in sorted(own, key=lambda row: (row["doc_hash"], row["doc_id"])):
            asked = list(ask(row)) if ask and len(kept) < most else []
            for each in asked:
                each |= {"messages": chats[each["prompt"]]} if each["prompt"] in chats else {}
            if asked and all(_can_be_kept(each) for each in asked):
                kept += [{"document": row["doc_hash"], **each} for each in asked]
        if kept:
            found[name] = kept
    return found


def add_answers(lm: Any, requests: Mapping[str, list[dict[str, Any]]]) -> None:
    """Add greedy answers to the prompts that have none yet (multiple choice): lm-eval's model continues them."""
    missing = [each for of_task in requests.values() for each in of_task if "answer" not in each]
    answers = greedy_continuations(lm, [each["prompt"] for each in missing], TOKENS)
    for each, answer in zip(missing, answers, strict=True):
        each |= {"answer": answer, "until": [], "tokens": TOKENS}


def _can_be_kept(request: Mapping[str, Any]) -> bool:
    texts = list(texts_in([request["prompt"], request.get("answer", ""), request.get("choices", [])]))
    return len(request["prompt"]) <= LONGEST and all(text == redacted(text) for text in texts)


def _choices(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The request with all continuations of a document's first prompt: several choices, or a single likelihood."""
    pairs = [(argument, response) for argument, response in zip(row["arguments"], row["resps"], strict=False)]
    prompt = pairs[0][0][0]
    alike = [(argument[1], response[0][0]) for argument, response in pairs if argument[0] == prompt]
    if prompt:
        likelihoods = [round(float(value), 4) for _, value in alike]
        yield {"prompt": prompt, "choices": [text for text, _ in alike], "likelihoods": likelihoods}


def _written(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The request with a document's greedy answer; none if the answer was drawn at random."""
    prompt, settings = row["arguments"][0][:2]
    if prompt and not settings.get("do_sample") and not settings.get("temperature"):
        until, answer = settings.get("until") or [], next(texts_in(row["resps"]), "")
        tokens = int(settings.get("max_gen_toks") or settings.get("max_tokens") or 256)
        yield {
            "prompt": prompt,
            "answer": answer,
            "until": [until] if isinstance(until, str) else list(until),
            "tokens": tokens,
        }


_ASKED = {"multiple_choice": _choices, "loglikelihood": _choices, "generate_until": _written}
