"""Calibration sets: chosen rows -> texts -> token ids, deterministically."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.importance.dataset_rows import LOADING, rows_of
from lewis.importance.row_texts import Text, texts_of
from lewis.models.config import needs_code
from lewis.quick_imports import quick_imports
from lewis.recipe.schema import CalibrationSet
from lewis.store import kinds

logger = logging.getLogger(__name__)
SEMANTICS = "4"  # bump when the same rows would give other token ids
EVERY = 4  # of so many rows, or prompts that an expert continues, the last is held out to judge a fit to the others
SAMPLES = "samples"  # key that every intact set in the store has
WEIGHTS = "weights"


@dataclass(frozen=True)
class Calibration:
    """A calibration set: the token ids of its samples, without padding, and how much each token counts.

    Attributes:
        name: of the set in the recipe.
        samples: the token ids of each sample.
        weights: for each sample, how much each token counts; None: all alike.
        prompts: for each sample, its prompt, as token ids or as a number; None: no expert has written the samples, and
            each is on its own.
    """

    name: str
    samples: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    prompts: tuple[tuple[int, ...] | int, ...] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids and weights, independent of the set's name and of where the texts came from."""
        return store.digest(self.samples if self.weights is None else [self.samples, self.weights])

    @property
    def factors(self) -> list[list[float]] | None:
        """The weights, scaled to a mean of 1 over all tokens, unless all are 0; None: all tokens count alike."""
        if self.weights is None:
            return None
        scale = self.tokens / (sum(map(sum, self.weights)) or 1)
        return [[weight * scale for weight in sample] for sample in self.weights]

    @property
    def of_answers(self) -> "Calibration":
        """The set in which only predictions of answers count: 1 for each token of an answer, 0 for the others.

        The last token of a prompt has the weight of an answer, since it predicts the answer's first token, but is no
        answer token itself. A set without weights does not mark answers: it is returned unchanged.
        """
        if self.weights is None:
            return self
        after = (zip((0.0, *sample), sample, strict=False) for sample in self.weights)
        weights = tuple(tuple(float(before == own == 1) for before, own in sample) for sample in after)
        return replace(self, weights=weights)

    @property
    def has_weight(self) -> bool:
        """Whether any token has a weight other than 0."""
        return any(map(any, self.weights)) if self.weights else self.tokens > 0

    @property
    def predicts(self) -> bool:
        """Whether a token after the first of its sample, which can be predicted, has a weight other than 0."""
        return any(any(weights[1:]) for weights in self.weights or [[1.0] * len(row) for row in self.samples])

    @property
    def answered(self) -> bool:
        """Whether it holds answers or whole texts; else it holds prompts, which an expert has yet to continue."""
        return self.weights is None or any(1.0 in each for each in self.weights)

    def part(self, rows: Iterable[int]) -> "Calibration":
        """Return the set of only the samples with these indices."""
        chosen = list(rows)
        samples = tuple(self.samples[i] for i in chosen)
        weights = self.weights and tuple(self.weights[i] for i in chosen)
        prompts = self.prompts and tuple(self.prompts[i] for i in chosen)
        return replace(self, samples=samples, weights=weights, prompts=prompts)

    def continuing(self, count: int) -> "Calibration":
        """Return the set with its `prompts`: an expert has written its samples, `count` to each prompt.

        Equal prompts are one, unless all tokens count alike: then the samples do not tell where a prompt ends.
        """
        if self.weights is None:
            places = sorted(continuation_places(len(self.samples) // count, count))
            return replace(self, prompts=tuple(prompt for *_, prompt in places))
        pairs = zip(self.samples, self.weights, strict=True)
        return replace(self, prompts=tuple(sample[: weights.index(1) + 1] for sample, weights in pairs))

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return sum(map(len, self.samples))

    def save(self) -> Path:
        """Write the set to the store, `calibrations/<digest>.json`, unless it is there already."""
        path = kinds.CALIBRATIONS.path(self.digest)
        if store.read_entry(path) is None:
            weights = {} if self.weights is None else {WEIGHTS: self.weights}
            store.write_entry(path, {"name": self.name, SAMPLES: self.samples, **weights}, indent=None)
        return path

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            LewisError: if it is gone or damaged.
        """
        content = store.read_entry(path)
        if content is None:
            raise LewisError(f"{path}: the calibration set is damaged, or is gone from the store; run again")
        samples, weights = (tuple(map(tuple, content.get(key) or ())) for key in (SAMPLES, WEIGHTS))
        return cls(content["name"], samples, weights or None)


def continuation_places(prompts: int, count: int) -> list[tuple[int, int, int]]:
    """The continuations that an expert writes, `count` for each prompt, as (group of prompts, round, prompt).

    Sorted, they are in the order of the set: each group of `EVERY` prompts is continued `count` times, round by round.
    """
    return [(i // EVERY, round_, i) for i in range(prompts) for round_ in range(count)]


def calibrate(name: str, spec: CalibrationSet, *, tokenizer: Path, root: Path) -> Calibration:
    """Choose samples of a calibration set and turn them into token ids.

    The rows are the first `samples` of `datasets.Dataset.shuffle(seed)`: `numpy.random.default_rng(seed).permutation`;
    all, if there are fewer than 128 and the recipe does not say how many. Each text is tokenised by the model's
    tokenizer (special tokens included) and cut to `max_tokens`, or filled up to it on the tokenizer's padding side.

    Args:
        name: the set's name in the recipe.
        spec: its block.
        tokenizer: folder of the base, whose tokenizer is used for all models.
        root: where relative `data_files` start.

    Raises:
        InputError: if the data cannot be read, a field of the template does not exist, or no tokens are left.
    """
    where, encode = f"lewis.calibrations.{name}", _load_tokenizer(tokenizer)
    with rows_of(where, spec, root) as rows:
        texts = _texts(where, spec, rows, encode)
    for text in texts:
        _check_unicode(where, text.content)
    try:
        cut = [text.tokens(encode, spec) for text in texts]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a tokenizer in Rust; it is no Exception
            raise
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: the base's tokenizer ({tokenizer}) does not take the texts: {why}") from error
    special = set(encode.all_special_ids)
    if all(special.issuperset(ids) for ids, _ in cut):
        unknown = ", or of nothing that the tokenizer knows" if any(ids for ids, _ in cut) else ""
        raise InputError(f"{where}: no tokens: all {len(texts)} texts are empty{unknown}; check `text`")
    if spec.padding == "max_tokens":
        cut = [_filled_up(where, encode, *each, spec) for each in cut]
    whole = [(tuple(map(int, ids)), tuple(weights)) for ids, weights in cut if ids]
    if len(whole) < len(cut):
        logger.warning("%s: %d of %d texts have no tokens and are left out", where, len(cut) - len(whole), len(cut))
    samples, weights = tuple(ids for ids, _ in whole), tuple(each for _, each in whole)
    found = Calibration(name, samples, None if spec.prompt_weight == 1 else weights)
    marked = () if spec.continues or found.weights is None else found.of_answers.weights or ()
    lost = sum(not any(each) for each in marked)
    why = f"the prompts fill max_tokens ({spec.max_tokens}), or the answers are empty"
    if lost == len(samples):
        raise InputError(
            f"{where}: no token of an answer is left: {why}; raise max_tokens, or set weight: {{prompt: 1}}"
        )
    if lost:
        logger.warning(
            "%s: %d of %d rows have no token of an answer left: %s; raise max_tokens", where, lost, len(samples), why
        )
    return found


def _texts(where: str, spec: CalibrationSet, rows: Any, tokenizer: Any) -> list[Text]:
    if not len(rows):
        raise InputError(f"{where}: the calibration set is empty; give it rows")
    order = np.random.default_rng(spec.seed).permutation(len(rows))[: spec.samples]
    if len(order) < spec.samples and "samples" in spec.model_fields_set:
        raise InputError(f"{where}.samples: {spec.samples} asked for, the set has {len(order)}; set it to that or less")
    try:
        chosen = [rows[int(i)] for i in order]
    except UnicodeDecodeError as error:  # JSON is decoded when a row is read
        raise InputError(f"{where}: a row is no UTF-8 text: {error.reason} at {error.object[:40]!r}") from error
    return texts_of(where, spec, chosen, tokenizer)


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise InputError(f"{where}: a text is no Unicode: half of a surrogate pair in {around!r}") from error


def _filled_up(
    where: str, tokenizer: Any, ids: list[int], weights: list[float], spec: CalibrationSet
) -> tuple[list[int], list[float]]:
    end, missing = tokenizer.eos_token_id, spec.max_tokens - len(ids)
    if end is None:
        raise InputError(f"{where}.padding: the base's tokenizer has no end-of-text token to fill up with; use none")
    filling, counts = [end] * missing, [spec.prompt_weight] * missing
    left = tokenizer.padding_side == "left"
    return (filling + ids, counts + weights) if left else (ids + filling, weights + counts)


def _load_tokenizer(folder: Path) -> Any:
    with LOADING, quick_imports():  # datasets inspects transformers, which must not be half loaded then
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, by tokenizer
        if "trust_remote_code" in str(error):
            raise needs_code(folder, "its tokenizer", "tokenizer_config.json") from error
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error
