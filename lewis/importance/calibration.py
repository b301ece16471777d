"""Calibration sets: rows of a dataset -> texts -> token ids, deterministically."""

import logging
import re
import string
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.input_files import check_regular
from lewis.models.config import needs_code
from lewis.recipe.schema import CalibrationSet
from lewis.store import kinds
from lewis.store.manifest import remembered_sha256

logger = logging.getLogger(__name__)
SEMANTICS = "2"  # bump when the same rows would give other token ids
SAMPLES = "samples"  # what a set in the store is whole with
MAX_FIELDS = 100  # of a template, each of four digits of width at most: with more, a text could take gigabytes
_KINDS = {list: "a list", tuple: "a list", dict: "a mapping", bytes: "bytes"}
# One set at a time: threads that load at once trip over tqdm's shared state inside datasets.
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Calibration:
    """Token ids of the samples, without padding, and the digest of exactly those ids."""

    name: str
    samples: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids, independent of the set's name and of where the texts came from."""
        return store.digest(self.samples)

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return sum(map(len, self.samples))

    def save(self) -> Path:
        """Write it to the store, `calibrations/<digest>.json`, unless it is there."""
        path = path_of(self.digest)
        if store.read_entry(path) is None:
            store.write_entry(path, {"name": self.name, SAMPLES: self.samples}, indent=None)
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
        return cls(content["name"], tuple(tuple(sample) for sample in content[SAMPLES]))


def path_of(digest: str) -> Path:
    """Where the store has a calibration set."""
    return kinds.CALIBRATIONS.path(digest)


def origin(where: str, spec: CalibrationSet, root: Path) -> list[str]:
    """What decides the rows of a set, beside its block: checksums of its files, or the commit of its dataset.

    Raises:
        InputError: as `calibrate`, if there are no such files or there is no such dataset.
    """
    if spec.texts is not None:
        return []
    arguments = _arguments(where, spec, root)
    if "revision" in arguments:
        return [arguments["revision"]]
    return [remembered_sha256(Path(path)) for path in arguments["data_files"]]


def calibrate(name: str, spec: CalibrationSet, *, tokenizer: Path, root: Path) -> Calibration:
    """Choose samples and turn them into token ids.

    The rows are the first `samples` of `datasets.Dataset.shuffle(seed)`: `numpy.random.default_rng(seed).permutation`;
    all, if there are fewer than 128 and the recipe does not say how many.
    Each text is tokenised as the model's tokenizer does (special tokens included) and cut to `max_tokens`, or
    filled up to it on the tokenizer's side.

    Args:
        name: the set's name in the recipe.
        spec: its block.
        tokenizer: folder of the base, whose tokenizer is used for all models.
        root: where relative `data_files` start.

    Raises:
        InputError: if the data cannot be read, a field of the template does not exist, or nothing is left.
    """
    where = f"lewis.calibrations.{name}"
    with _rows(where, spec, root) as rows:
        texts = _texts(where, spec, rows)
    for text in texts:
        _check_unicode(where, text)
    encode = _load_tokenizer(tokenizer)
    cut = [encode(text, truncation=False, add_special_tokens=True)["input_ids"][: spec.max_tokens] for text in texts]
    special = set(encode.all_special_ids)
    if all(special.issuperset(ids) for ids in cut):
        unknown = ", or of nothing that the tokenizer knows" if any(cut) else ""
        raise InputError(f"{where}: no tokens: all {len(texts)} texts are empty{unknown}; check `text`")
    if spec.padding == "max_tokens":
        cut = [_filled_up(where, encode, ids, spec.max_tokens) for ids in cut]
    samples = tuple(tuple(int(i) for i in ids) for ids in cut if ids)
    if len(samples) < len(cut):
        logger.warning("%s: %d of %d texts have no tokens and are left out", where, len(cut) - len(samples), len(cut))
    return Calibration(name, samples)


def _texts(where: str, spec: CalibrationSet, rows: Any) -> list[str]:
    if not len(rows):
        raise InputError(f"{where}: the calibration set is empty; give it rows")
    order = np.random.default_rng(spec.seed).permutation(len(rows))[: spec.samples]
    if len(order) < spec.samples and "samples" in spec.model_fields_set:
        raise InputError(f"{where}.samples: {spec.samples} asked for, the set has {len(order)}; set it to that or less")
    try:
        chosen = [rows[int(i)] for i in order]
    except UnicodeDecodeError as error:  # JSON is decoded when a row is read
        raise InputError(f"{where}: a row is no UTF-8 text: {error.reason} at {error.object[:40]!r}") from error
    return [row if isinstance(row, str) else _fill(where, spec.text or "", row) for row in chosen]


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise InputError(f"{where}: a text is no Unicode: half of a surrogate pair in {around!r}") from error


def _filled_up(where: str, tokenizer: Any, ids: list[int], length: int) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(f"{where}.padding: the base's tokenizer has no end-of-text token to fill up with; use none")
    filling = [end] * (length - len(ids))
    return filling + ids if tokenizer.padding_side == "left" else ids + filling


@contextmanager
def _rows(where: str, spec: CalibrationSet, root: Path) -> Iterator[Any]:
    """The rows of a set.

    What `datasets` builds of local files has no checksums, so it is built anew each time and removed afterwards: a set
    that was made is found in the store.
    """
    if spec.texts is not None:
        yield list(spec.texts)
        return
    cache = store.beside(store.make_folder(store.home()) / "rows")
    try:
        with _LOADING:
            rows = _load_dataset(where, spec, root, cache)
        yield rows
    finally:
        store.discard(cache)


def _load_dataset(where: str, spec: CalibrationSet, root: Path, cache: Path) -> Any:
    arguments = _arguments(where, spec, root)
    import datasets

    datasets.disable_progress_bars()
    repo = (spec.dataset or "").partition("@")[0]
    if repo in ("json", "parquet"):
        arguments["cache_dir"] = str(cache)
    try:
        return datasets.load_dataset(repo, split=spec.split, **arguments)
    except Exception as error:  # datasets raises many kinds, also bare ones of its parsers
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise InputError(
            f"{where}: cannot load {repo!r} (config {spec.config}, split {spec.split}): {reason}"
        ) from error


def _arguments(where: str, spec: CalibrationSet, root: Path) -> dict[str, Any]:
    """Of `datasets.load_dataset`: local files that are there, or a dataset at its commit."""
    repo, _, revision = (spec.dataset or "").partition("@")
    arguments: dict[str, Any] = {"name": spec.config}
    if spec.data_files:
        files = (spec.data_files,) if isinstance(spec.data_files, str) else spec.data_files
        paths = [_place(where, file, root) for file in files] if repo in ("json", "parquet") else list(files)
        absent = [path for path in paths if repo in ("json", "parquet") and not Path(path).is_file()]
        for path in paths:
            check_regular(Path(path))
        empty = [path for path in paths if Path(path).is_file() and not Path(path).stat().st_size]
        if empty:
            raise InputError(f"{where}.data_files: {empty[0]} is empty; give it rows")
        if absent:
            raise InputError(
                f"{where}.data_files: no such file: {absent[0]}; relative paths start at the recipe's folder"
            )
        arguments["data_files"] = paths
    if repo not in ("json", "parquet"):
        from lewis.models.hub.repository import resolve_dataset

        arguments["revision"] = resolve_dataset(repo, revision or None)
    return arguments


def _place(where: str, file: str, root: Path) -> str:
    try:
        return str(root / Path(file).expanduser())
    except RuntimeError as error:  # "~nobody"
        raise InputError(f"{where}.data_files: {file}: {error}") from error


def _fill(where: str, template: str, row: Mapping[str, Any]) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{where}.text: {template!r} is no template: {error}; write {{{{ for a brace") from error
    if len(parts) > MAX_FIELDS:
        raise InputError(f"{where}.text: expected at most {MAX_FIELDS} fields, got {len(parts)}")
    for _, field, format_spec, conversion in parts:
        if field is None:
            continue
        column = field.split("[")[0]
        if any(len(number.lstrip("0")) > 4 for number in re.findall(r"\d+", format_spec or "")):
            raise InputError(f"{where}.text: {{{field}:{format_spec}}}: expected a width of at most 9999 characters")
        if not column or "." in field or "{" in (format_spec or ""):
            raise InputError(f'{where}.text: {{{field}}}: expected names of columns, such as "{{question}} {{answer}}"')
        if column not in row:
            raise InputError(f"{where}.text: there is no column {column!r}; the dataset has {', '.join(row)}")
        value = _value_of(where, template, field, row)
        if not conversion and isinstance(value, list | tuple | dict | bytes):
            raise InputError(
                f"{where}.text: {{{field}}} is {_KINDS[type(value)]} in a row, expected a text or a number; name a "
                f"part of it ({{{field}[0]}}), or write {{{field}!s}} for its Python form"
            )
    try:
        return template.format_map({column: "" if value is None else value for column, value in row.items()})
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}.text: {template!r} cannot be filled from a row: {error}") from error


def _value_of(where: str, template: str, field: str, row: Mapping[str, Any]) -> Any:
    try:
        return string.Formatter().get_field(field, (), row)[0]
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}.text: {template!r} cannot be filled from a row: {error}") from error


def _load_tokenizer(folder: Path) -> Any:
    with _LOADING:  # datasets looks into transformers, which must not be half loaded then
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, by tokenizer
        if "trust_remote_code" in str(error):
            raise needs_code(folder, "its tokenizer", "tokenizer_config.json") from error
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error
