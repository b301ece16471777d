"""Open lm-eval's model in the process that runs it, and measure on it what the gate's guards check.

The guards check empty answers, whether generations end, and perplexity.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

from lewis import private_names
from lewis.evaluation.harness.answer_texts import of_first_filter, texts_in
from lewis.evaluation.harness.kept_answers import KeptAnswers
from lewis.models.files.safetensors_file import file_headers
from lewis.models.lora.expert import WEIGHTS
from lewis.models.names import PER_TOKEN

PROMPTS, TOKENS = 4, 128  # generations, and the most new tokens of each
ANSWERS = 64  # reference answers whose perplexity is measured


def open_model(name: str, arguments: dict[str, Any], batch_size: int | str, device: str | None) -> Any:
    """Open lm-eval's model in this process.

    Args:
        name, arguments, device: as in `lewis.evaluation.harness.backends.HarnessModel`.
        batch_size: prompts of one forward pass, or of one request.
    """
    from lm_eval.api.registry import get_model

    options = {"batch_size": batch_size, "device": device}
    if not name.startswith("local-"):
        with _keep_rows(arguments.get("peft")):
            return get_model(name).create_from_arg_obj(arguments, options)
    if name == "local-completions" and "max_length" not in arguments:
        arguments = {**arguments, "max_length": _max_length(arguments["model"])}
    lm: Any = get_model(name).create_from_arg_obj(arguments, {"batch_size": batch_size})
    if lm.tokenizer is not None:  # it splits texts into tokens as `hf` does
        lm.add_bos_token = arguments.get("add_bos_token")  # None: the tokenizer's own choice, as for `hf`
        lm.tok_encode = _encoder(lm)
    lm.parse_logprobs = _checked(lm.parse_logprobs)
    return lm


def record_chats(lm: Any) -> dict[str, list[dict[str, str]]]:
    """Record each later use of the chat template: return a mapping, which grows, of prompts to their messages."""
    found, apply = dict[str, list[dict[str, str]]](), getattr(lm, "apply_chat_template", None)
    if apply is None:
        return found

    def noting(messages: Any, *arguments: Any, **options: Any) -> Any:
        prompt = apply(messages, *arguments, **options)
        if isinstance(prompt, str) and isinstance(messages, list):
            found[prompt] = [{key: str(value) for key, value in each.items()} for each in messages]
        return prompt

    lm.apply_chat_template = noting
    return found


def _max_length(folder: str) -> int:
    """The longest input of the model in tokens, as lm-eval finds it for `hf`."""
    import transformers
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH, resolve_max_length

    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return int(resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH))


def _encoder(lm: Any) -> Any:
    """`tok_encode` of lm-eval's `hf`, for one text or several."""
    from lm_eval.models.utils import has_bos_prefix

    def encode(
        text: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
    ) -> Any:
        if not isinstance(text, str):
            return [encode(each, left_truncate_len, add_special_tokens) for each in text]
        special = lm.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(text, lm.tokenizer.bos_token):
            special = False
        found = lm.tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special}))
        return found[-left_truncate_len:] if left_truncate_len else found

    return encode


def _checked(parse: Any) -> Any:
    """Wrap lm-eval's `parse_logprobs`, which takes a token without a likelihood as certain, to raise ValueError."""

    def checked(outputs: Any, tokens: Sequence[Sequence[int]], ctxlens: Any, **options: Any) -> Any:
        answers = outputs if isinstance(outputs, list) else [outputs]
        choices = [sorted(each.get("choices") or (), key=itemgetter("index")) for each in answers]
        found = [len((choice.get("logprobs") or {}).get("token_logprobs") or ()) for of in choices for choice in of]
        for prompt, count in zip_longest(tokens, found, fillvalue=()):
            if count != len(prompt) + 1:
                raise ValueError(
                    f"the server has to give the likelihoods of all {len(prompt)} tokens of a prompt and of one more "
                    f"(`echo` with `logprobs`), and gave {count or 'none'}; take a server that does, such as vLLM, or "
                    "tasks that generate"
                )
        return parse(outputs=outputs, tokens=tokens, ctxlens=ctxlens, **options)

    return checked


@contextmanager
def _keep_rows(adapter: str | None) -> Iterator[None]:
    """A context in which embeddings are resized only as far as the adapter needs.

    lm-eval resizes the base's embeddings to the number of tokens, for adapters with tokens of their own. Many bases
    have more rows than tokens. An adapter that saves all rows would then not load, and one that saves none would be
    scored with fewer tokens than its base.
    """
    if adapter is None:
        yield
        return
    wanted, resize = _rows(Path(adapter)), private_names.RESIZE_EMBEDDINGS.get()

    def resized(model: Any, new_num_tokens: int, *arguments: Any, **options: Any) -> Any:
        present = model.get_input_embeddings().weight.shape[0]
        rows = wanted or max(new_num_tokens, present)
        return model.get_input_embeddings() if rows == present else resize(model, rows, *arguments, **options)

    with private_names.RESIZE_EMBEDDINGS.replaced(resized):
        yield


def _rows(adapter: Path) -> int | None:
    """How many rows the embeddings and the head have in an adapter; None if it changes neither."""
    for name, (_, shape) in file_headers(adapter / WEIGHTS).items():
        if name.endswith((*PER_TOKEN, "lm_head.lora_B.weight")):
            return shape[0]
        if name.endswith("lora_embedding_A"):
            return shape[1]
    return None


def measure_ends(
    lm: Any, rows: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any], kept: KeptAnswers | None = None
) -> dict[str, Any]:
    """Measure the fields of `lewis.evaluation.statistics.scores.Ends`.

    Args:
        lm: lm-eval's model.
        rows: task -> lm-eval's sample of each document and filter.
        tasks: task -> lm-eval's task.
        kept: the answers in which the outcome of the generations is kept; None: it is not kept.
    """
    if getattr(lm, "batch_size_per_gpu", None) == "auto":  # else it searches for a size again, for these few requests
        lm.batch_size_per_gpu = PROMPTS
    of_task = {name: of_first_filter(each) for name, each in rows.items()}
    pairs = ([(tasks[name], row) for row in each] for name, each in of_task.items())
    mixed = [pair for each in zip_longest(*pairs) for pair in each if pair is not None]
    prompts = dict.fromkeys(row["arguments"][0][0] for _, row in mixed if len(row["arguments"][0]) > 1)
    first = list(islice(filter(None, prompts), PROMPTS))
    ended = kept.once("ends", first, lambda: _ended(lm, first)) if kept else _ended(lm, first)
    return {
        "empty": {
            name: sum(not any(text.strip() for text in texts_in(row["resps"])) for row in each) / len(each)
            for name, each in of_task.items()
            if each and tasks[name].OUTPUT_TYPE == "generate_until"
        },
        "tried": len(ended),
        "ended": sum(ended),
        "perplexity": _perplexity(lm, list(islice(_answers(mixed), ANSWERS))),
    }


def _ended(lm: Any, prompts: list[str]) -> list[bool]:
    """Whether a greedy generation from each prompt reaches an end token; a chat template is applied if there is one.

    Where only its text is known, a generation has ended if it has fewer tokens than it may have. Nothing is generated
    without a tokenizer to count them, as in chats with a server.
    """
    tokenizer = getattr(lm, "tokenizer", None)
    if not prompts or tokenizer is None:
        return []
    if getattr(tokenizer, "chat_template", None):
        prompts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = min(TOKENS, lm.max_length // 2)
    if not hasattr(lm, "model") or not hasattr(lm.model, "generation_config"):
        texts = greedy_continuations(lm, prompts, wanted)
        return [len(lm.tok_encode(text, add_special_tokens=False)) < wanted for text in texts]
    import torch

    ids, mask = lm.tok_batch_encode(prompts, left_truncate_len=lm.max_length - wanted)
    listed = lm.model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    stops = sorted({stop for stop in (*listed, tokenizer.eos_token_id) if stop is not None})
    with torch.no_grad():
        made = lm.model.generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            max_new_tokens=wanted,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops or None,
        )
    return [bool(set(stops) & set(row.tolist())) for row in made[:, ids.shape[1] :]]


def greedy_continuations(lm: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """The greedy continuation of each prompt by lm-eval's model, of at most `tokens` tokens."""
    from lm_eval.api.instance import Instance

    settings = {"until": [], "max_gen_toks": tokens, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(settings)), n) for n, prompt in enumerate(prompts)]
    return list(lm.generate_until(asked, disable_tqdm=True)) if asked else []


def _answers(rows: list[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[str, str, float | None]]:
    """Prompt and reference answer of each document that has one, and the answer's log-likelihood if that is known."""
    for task, row in rows:
        arguments, target, kind = row["arguments"], row["target"], task.OUTPUT_TYPE
        target = 0 if kind == "loglikelihood" else target
        if kind in ("loglikelihood", "multiple_choice") and isinstance(target, int) and 0 <= target < len(arguments):
            if arguments[target][1]:  # an empty one has no likelihood
                yield arguments[target][0], arguments[target][1], float(row["resps"][target][0][0])
        elif kind == "generate_until":
            answer = next(texts_in(target), "")
            if answer.strip():
                yield arguments[0][0], f"{task.config.target_delimiter}{answer}", None


def _perplexity(lm: Any, answers: list[tuple[str, str, float | None]]) -> float | None:
    """Perplexity per token over reference answers; None without such answers, without a tokenizer, or with thinking."""
    from lm_eval.api.instance import Instance

    if lm.tokenizer is None or getattr(lm, "enable_thinking", None):  # a chat with a server has no likelihoods
        return None
    tokens = sum(len(lm.tok_encode(answer, add_special_tokens=False)) for _, answer, _ in answers)
    if not tokens:
        return None
    pairs = [(prompt, answer) for prompt, answer, known in answers if known is None]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    computed = [found[0] for found in lm.loglikelihood(requests, disable_tqdm=True)] if requests else []
    mean = (sum(known for *_, known in answers if known is not None) + sum(computed)) / tokens
    return math.inf if -mean >= 700 else math.exp(-mean)  # NaN stays NaN
