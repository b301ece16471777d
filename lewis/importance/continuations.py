"""Calibration rows that an expert writes: it samples continuations of each prompt of a calibration set.

A fit imitates the expert, so the expert's own text serves as well as labels, and there can be more of it than rows. The
continuations are drawn from the expert's own distribution (temperature 1), which the merged model is to reproduce.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from lewis import store
from lewis.devices import precision
from lewis.errors import InputError
from lewis.importance import measure
from lewis.importance.calibration import Calibration, continuation_places
from lewis.importance.step import CalibrationEntry
from lewis.input_files import read_json
from lewis.lazy_torch import torch
from lewis.models.config import read_config
from lewis.models.source import ModelFiles
from lewis.models.tokenizer import clash, read_vocabulary, tokenizer_folder
from lewis.progress import Report, silent
from lewis.store import kinds

logger = logging.getLogger(__name__)
SEMANTICS = "2"  # bump when the same prompts would be continued differently
BATCH = 32  # continuations that are generated together
_ALONE = ("recurrent_gemma", "rwkv")  # types of models whose states take padding for text
_DRAWING = Lock()  # all threads share torch's random generators
_PURE: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_beams": 1}


@dataclass(frozen=True)
class ContinueInput:
    """Everything that decides which continuations an expert writes.

    Attributes:
        prompts: the calibration set, whose rows are prompts.
        files: of the expert.
        count: number of continuations of each prompt.
        max_tokens: of a prompt with its continuation, at most.
        seed: of the draws.
        weight: how much a token of a prompt counts, compared with 1 for a token of a continuation.
        base: the model whose tokenizer made the prompts' token ids.
    """

    prompts: CalibrationEntry
    files: ModelFiles
    count: int
    max_tokens: int
    seed: int
    weight: float
    base: ModelFiles

    def digest(self, device: str) -> str:
        """Identity of the rows that the expert writes on a device."""
        from importlib.metadata import version

        how = [self.count, self.max_tokens, self.seed, self.weight, precision(device), version("transformers")]
        more = sorted(set(_ends(self.files)) - _ends_in(self.files.folder))  # which the folder's own configs lack
        ends = [["ends", more]] if more else []
        alone = ["alone"] if self.alone else []
        return store.digest(["continue", SEMANTICS, self.prompts.digest, self.files.read_as, *how, *ends, *alone])

    @property
    def alone(self) -> bool:
        """Whether only prompts of one length are continued together."""
        return read_config(self.files.folder).get("model_type") in _ALONE


def find_continued(given: ContinueInput, device: str) -> CalibrationEntry | None:
    """Return the rows that the expert has written before; None if the store does not have them."""
    known = store.entry(kinds.CALIBRATIONS.path(given.digest(device)), "written") or {}
    path = kinds.CALIBRATIONS.path(known.get("digest", ""))
    return None if store.read_entry(path) is None else CalibrationEntry(name=given.prompts.name, path=path, **known)


def continue_prompts(given: ContinueInput, report: Report = silent, device: str = "cpu") -> CalibrationEntry:
    """Let the expert continue each prompt, or find its earlier continuations in the store.

    The whole expert is in memory meanwhile: in fp32 on the CPU, in its stored dtype on a GPU.

    Args:
        report: called with the continuations done and in all.

    Raises:
        InputError: if the model predicts no next token or has other token ids than the base, or no prompt leaves room
            for a continuation.
    """
    digest = given.digest(device)
    with store.turn(kinds.CALIBRATIONS, digest):
        if found := find_continued(given, device):
            return found
        written = _write(given, report, device)
        given.files.check_unchanged()
        known, path = {"digest": written.digest, "tokens": written.tokens}, written.save()
        store.write_entry(kinds.CALIBRATIONS.path(digest), {"written": known})
    return CalibrationEntry(name=written.name, path=path, **known)


def _write(given: ContinueInput, report: Report, device: str) -> Calibration:
    prompts = given.prompts.load()
    if other := clash(tokenizer_folder(given.base.open()), tokenizer_folder(given.files.open())):
        raise InputError(
            f"{given.files.ref}: another vocabulary: {other}; the prompts of lewis.calibrations.{prompts.name} become "
            "the base's token ids, so this expert cannot continue them: give it rows with answers"
        )
    network, ends = _loaded(given.files, prompts, device), _ends(given.files)
    takes = measure.context_length(network)
    given = replace(given, max_tokens=int(min(given.max_tokens, takes)))
    rows = [row for row in prompts.samples if len(row) < given.max_tokens]
    where = f"lewis.calibrations.{prompts.name}"
    limit = f"max_tokens ({given.max_tokens})" if given.max_tokens < takes else f"the {takes} tokens that it takes"
    if not rows:
        raise InputError(
            f"{where}: every prompt fills {limit} and leaves no room to continue it; raise max_tokens, or give shorter "
            "prompts"
        )
    if left := len(prompts.samples) - len(rows):
        logger.warning("%s: %d of %d prompts fill %s and are left out", where, left, len(prompts.samples), limit)
    places = continuation_places(len(rows), given.count)
    places.sort(key=lambda place: len(rows[place[-1]]), reverse=True)
    rows, written, what = [rows[i] for *_, i in places], list[tuple[int, ...]](), f"{given.files.ref} continues"
    report(what, 0, len(rows))
    with _DRAWING, torch.random.fork_rng():
        torch.manual_seed(given.seed % (1 << 64))  # torch takes no greater seed
        while len(written) < len(rows):
            batch = rows[len(written) : len(written) + BATCH]
            batch = [row for row in batch if len(row) == len(batch[0]) or not given.alone]
            # All prompts of a batch are continued by as many tokens as its shortest one.
            batch = [row for row in batch if given.max_tokens + len(batch[0]) - len(row) <= takes]
            written += _continued(network, batch, given, ends, device)
            report(what, len(written), len(rows))
    samples, weights = list[tuple[int, ...]](), list[tuple[float, ...]]()
    for _, prompt, more in sorted(zip(places, rows, written, strict=True)):
        samples.append(prompt + more)
        # The last token of a prompt predicts the first of the answer.
        weights.append((*[given.weight] * (len(prompt) - 1), 1.0, *[1.0] * len(more)))
    return Calibration(prompts.name, tuple(samples), None if given.weight == 1 else tuple(weights))


def _loaded(files: ModelFiles, prompts: Calibration, device: str) -> Any:
    """The expert's network with all its weights.

    Raises:
        InputError: if it does not predict the next token, or has no embedding for a token of the prompts.
    """
    from lewis.importance.streaming import Weights

    model = files.open()
    dtype = torch.float32 if device == "cpu" else measure.stored_dtype(model)
    network = measure.network_of(model, dtype)
    if not network.predicts_next_token:
        raise InputError(f"{files.ref}: this model does not write text token by token; leave `continue` out")
    measure.check_tokens(model, network, prompts)
    weights = Weights(network, model, device, dtype)
    weights.load_outside(with_head=True)
    for path in network.blocks:
        weights.load(network.parameters_in(path))
    return network.module


def _ends(files: ModelFiles) -> list[int]:
    """The ids of the tokens that end a text: by the configs of the expert and its adapters, and by its tokenizer."""
    found = set().union(*map(_ends_in, files.folders))
    path = files.tokenizer / "tokenizer_config.json"
    content = read_json(path) if path.is_file() else None
    end = content.get("eos_token") if isinstance(content, dict) else None
    end = end.get("content") if isinstance(end, dict) else end
    known = (read_vocabulary(files.tokenizer) or {}).get(end) if isinstance(end, str) else None
    return sorted(found if known is None else {*found, known})


def _ends_in(folder: Path) -> set[int]:
    """The ids of the tokens that end a text, by `generation_config.json` and `config.json` together."""
    found = set[int]()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        content = read_json(path) if path.is_file() else None
        ends = content.get("eos_token_id") if isinstance(content, dict) else None
        found |= set(ends) if isinstance(ends, list) else {ends} if isinstance(ends, int) else set()
    return found


def _continued(
    network: Any, prompts: Sequence[tuple[int, ...]], given: ContinueInput, ends: Sequence[int], device: str
) -> list[tuple[int, ...]]:
    """Sample one continuation of each prompt, which includes the token that ends it."""
    width = max(map(len, prompts))
    fill = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * missing + list(prompt) for missing, prompt in zip(fill, prompts, strict=True)])
    mask = torch.tensor([[0] * missing + [1] * (width - missing) for missing in fill])
    with torch.inference_mode():
        whole = network.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=given.max_tokens - min(map(len, prompts)),
            eos_token_id=ends or None,
            pad_token_id=0,
            **_PURE,
        )
    written = []
    for prompt, row in zip(prompts, whole[:, width:].tolist(), strict=True):
        row = row[: given.max_tokens - len(prompt)]
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        written.append(tuple(row[: end + 1]))
    return written
