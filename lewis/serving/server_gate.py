"""The check of a server before it gets traffic: does it answer as the scored model did?

The evaluation of a merge keeps the requests about some documents and the model's answers. The same requests are sent to
the OpenAI API of the server. This shows what a server can get wrong: another chat template, dtype, quantisation,
tokenizer, maximum length or RoPE scaling, or another model.

Greedy answers of 16 tokens are compared up to the first difference. Of SmolLM2-135M with an adapter, served in bfloat16
and scored in float32, 86 % of the text is the same, and of the base or another adapter 2 %
(tests/benchmarks/serving.md). Log-likelihoods are compared per token only if the recipe says so: the server has to give
those of a prompt (`echo`), and the engine of vLLM 0.32 for CPUs ends if asked for those of several adapters together.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from lewis.errors import LewisError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import find_score, furthest_look, scoring_devices
from lewis.recipe.serve import Check
from lewis.serving.requests_to import json_of, send, with_key
from lewis.store import read_entry

_TOKENS = 16  # compared of each greedy answer; longer ones often differ where two tokens are nearly equally likely
_SHOWN = 3  # differing documents that an error message shows
_SECONDS = 300.0  # for one request


@dataclass(frozen=True)
class Answer:
    """The answers of the scored model and of the server to one request.

    Attributes:
        task: of lm-eval.
        prompt: the end of the prompt.
        scored: the answer of the model that was scored, or its log-likelihoods.
        served: the answer of the server, or its log-likelihoods.
        difference: nats per token, the largest of all choices; None for a greedy answer.
        share: how much is the same, from 0 to 1: the part of the longer answer before the first difference. Of
            log-likelihoods, 1 if they differ by at most the tolerance, else 0.
    """

    task: str
    prompt: str
    scored: str
    served: str
    difference: float | None
    share: float


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        answers: all requests.
        agree: the least `share` with which the check passes.
    """

    answers: tuple[Answer, ...]
    agree: float

    @property
    def passed(self) -> bool:
        """Whether enough of the answers' text is the same."""
        return self.share >= self.agree

    @property
    def share(self) -> float:
        """The mean of the answers' shares; 0 without answers."""
        return sum(each.share for each in self.answers) / max(1, len(self.answers))

    @property
    def differing(self) -> list[Answer]:
        """The answers that differ, the worst first."""
        return sorted((each for each in self.answers if each.share < 1), key=lambda each: each.share)

    def line(self) -> str:
        """The result in a sentence."""
        same = len(self.answers) - len(self.differing)
        found = [each.difference for each in self.answers if each.difference is not None]
        mean = f", likelihoods differ by {sum(found) / len(found):.2g} nats per token" if found else ""
        whole = f"{same} of {len(self.answers)} answers are those of the model that was scored"
        return f"{whole}, {self.share:.0%} of their text{mean}"


class RefusedError(LewisError):
    """The server does not answer as the scored model did.

    Attributes:
        differing: the answers that differ.
    """

    def __init__(self, message: str, differing: Sequence[Answer] = ()) -> None:
        """
        Args:
            differing: the answers that differ.
        """
        super().__init__(message)
        self.differing = tuple(differing)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Answer, ...]]]:
        return type(self), (str(self), self.differing)


def requests(digest: str, settings: EvalSettings | None) -> dict[str, list[dict[str, Any]]]:
    """The requests that a merge's evaluation has kept, by task; empty if it has kept none.

    They are of the documents that decided: those drawn for the merge, those of the last look if the evaluation ended
    early, or those that confirmed the result of a search.

    Args:
        digest: of the merge.
        settings: of the recipe's evaluation; None: it has none.
    """
    if settings is None:
        return {}
    tried = (settings.drawn_by(digest), replace(settings, documents="confirm"))
    return next(filter(None, (_requests(digest, each) for each in tried)), {})


def _requests(digest: str, settings: EvalSettings) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for each in replace(settings, look=furthest_look("champion", digest, settings)).by_task():
        entries = (find_score("champion", digest, each, device) for device in scoring_devices())
        entry = next(filter(None, entries), None)
        found |= ((read_entry(entry.path) or {}).get("requests") or {}) if entry else {}
    return found


def check(api: str, model: str, kept: Mapping[str, Sequence[Mapping[str, Any]]], block: Check) -> Checked:
    """Send kept requests to a server, and compare its answers with the kept ones.

    Args:
        api: URL of the server's OpenAI API, with /v1.
        model: the name that the server knows the model by.
        kept: the requests, as `requests` returns them.
        block: the target's block `check` in the recipe.

    Raises:
        TransientError: if the server does not answer, or is busy.
        LewisError: if it refuses a request, or its answer lacks what is compared.
    """
    share = max(1, block.documents // max(1, len(kept)))
    sample = [(task, each) for task, of_task in kept.items() for each in of_task[:share]]
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda pair: _text(api, model, pair[0], pair[1]), sample))
        choices = [pair for pair in sample if block.likelihoods and "choices" in pair[1]]
        asked += pool.map(lambda pair: _likelihoods(api, model, pair[0], pair[1], block.tolerance), choices)
        return Checked(tuple(asked), block.agree)


def judge(checked: Checked) -> None:
    """Raise RefusedError if a check has failed; the message has the first answers side by side."""
    if checked.passed:
        return
    shown = [
        f"{each.task}: ...{each.prompt[-80:]!r}: scored {each.scored[:120]!r}, served {each.served[:120]!r}"
        for each in checked.differing[:_SHOWN]
    ]
    fix = "look at the server's chat template, dtype, quantisation, tokenizer and maximum length"
    raise RefusedError("; ".join([f"only {checked.line()}; {fix}", *shown]), checked.differing)


def _likelihoods(api: str, model: str, task: str, kept: Mapping[str, Any], tolerance: float) -> Answer:
    prompt, differences, values = str(kept["prompt"]), list[float](), list[float]()
    for choice, expected in zip(kept["choices"], kept["likelihoods"], strict=True):
        body = {"prompt": prompt + choice, "max_tokens": 1, "echo": True, "logprobs": 1}
        body |= {"add_special_tokens": False} if kept.get("messages") else {}  # the chat template has added them
        found = _post(f"{api}/completions", {"model": model, **body})
        own = _of_continuation(found, len(prompt.rstrip()), len(prompt + choice))
        values.append(sum(own))
        differences.append(abs(sum(own) - expected) / max(1, len(own)))
    worst = max(differences, default=0.0)
    scored, served = (", ".join(f"{value:.2f}" for value in each) for each in (kept["likelihoods"], values))
    alike = math.isfinite(worst) and worst <= tolerance
    return Answer(task, prompt[-200:], scored, served, worst, float(alike))


def _of_continuation(choice: Mapping[str, Any], start: int, end: int) -> list[float]:
    """Return the log-probabilities of those tokens of an echoed text that begin at characters `start` to `end` - 1."""
    try:
        known = choice["logprobs"]
        pairs = list(zip(known["text_offset"], known["token_logprobs"], strict=True))
        own = [float(value) for offset, value in pairs if value is not None and start <= offset < end]
    except (KeyError, TypeError, ValueError) as error:
        raise LewisError(
            "the server gives no log-probabilities of a prompt (`echo`), so it cannot be checked"
        ) from error
    return own or [math.nan]


def _text(api: str, model: str, task: str, kept: Mapping[str, Any]) -> Answer:
    tokens = min(_TOKENS, int(kept["tokens"]))
    body = {"model": model, "max_tokens": tokens, "temperature": 0}
    if kept.get("messages"):
        found = _post(f"{api}/chat/completions", {**body, "messages": kept["messages"]})
        message = found.get("message")
        text = str((isinstance(message, dict) and message.get("content")) or "")
    else:
        found = _post(f"{api}/completions", {**body, "prompt": kept["prompt"]})
        text = str(found.get("text") or "")
    cut = found.get("finish_reason") == "length"
    for stop in filter(None, kept["until"]):  # not in the request: servers with some tokenizers fail on `stop`
        text, at, _ = text.partition(stop)
        cut = cut and not at
    scored, served = str(kept["answer"]).strip(), text.strip()
    if cut:  # cut both answers at the same place
        scored = scored[: max(len(served), 1)]
    shorter = min(len(scored), len(served))
    parts = next((i for i in range(shorter) if scored[i] != served[i]), shorter)
    share = parts / max(len(scored), len(served), 1) if scored != served else 1.0
    return Answer(task, str(kept["prompt"])[-200:], scored, served, None, share)


def _post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Post a request, and return the first choice of the answer."""
    answer = send("POST", url, body=body, headers=with_key(url), timeout_s=_SECONDS)
    try:
        return dict(json_of(answer)["choices"][0])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LewisError(f"the server's answer has no choices: {answer.text[:300]}") from error
