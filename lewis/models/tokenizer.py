"""A model's tokenizer: the folder that it is in, and the row that each token has in the embedding."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.files.folder import tokenizer_files
from lewis.models.model import Model, View

TOKENIZER = "tokenizer.json"
_MOST = 1 << 24  # ids of tokens are less than this, since rows are counted up to the highest id
FIX = "to match embeddings by token, set tokenizer_source to base, union or a model"


def tokenizer_folder(model: Model) -> Path:
    """Return the folder with a model's tokenizer; an adapter's own tokenizer comes before its base's."""
    while isinstance(model, View) and not (model.folder / TOKENIZER).is_file():
        model = model.model
    return model.folder


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Read token -> id from a folder's tokenizer.json, added tokens included; None if there is no such file.

    Raises:
        InputError: if the file is damaged.
    """
    try:
        content = read_json(folder / TOKENIZER)
    except FileNotFoundError:
        return None
    except (OSError, InputError) as error:
        raise InputError(f"{folder / TOKENIZER}: no tokenizer: {error}; download it again") from error
    try:
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # a unigram's: [token, score] in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
        found = {**vocabulary, **added}
        if not found:
            raise ValueError("it holds no token")
        if odd := next((t for t, number in found.items() if not 0 <= number < _MOST), None):
            raise ValueError(f"the token {odd!r} has the id {found[odd]}")
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / TOKENIZER}: no tokenizer: {error!r}; download it again") from error


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same tokenizer.json, byte by byte. This is much faster than parsing both."""
    try:
        return filecmp.cmp(one / TOKENIZER, other / TOKENIZER, shallow=False)
    except OSError:
        return False


def clash(base: Path, expert: Path) -> str | None:
    """Describe the first conflict of two vocabularies: a token with two ids, or an id with two tokens.

    Args:
        base, expert: the folders of their tokenizers; one without a tokenizer.json uses the other's.

    Returns:
        The conflict in words; None if there is none, so that equal rows of the embeddings stand for equal tokens.
    """
    if same(base, expert):
        return None
    ours, theirs = read_vocabulary(base), read_vocabulary(expert)
    if ours is None or theirs is None:
        return None
    if (moved := next((t for t in ours if t in theirs and theirs[t] != ours[t]), None)) is not None:
        return f"the token {moved!r} is {theirs[moved]}, in the base it is {ours[moved]}"
    by_id = {number: token for token, number in ours.items()}
    if (other := next((t for t, i in theirs.items() if by_id.get(i, t) != t), None)) is not None:
        return f"token {theirs[other]} is {other!r}, in the base it is {by_id[theirs[other]]!r}"
    return None


def vocabulary_of(model: Model, default: Mapping[str, int], rows: int) -> dict[str, int]:
    """The tokens of a model that have a row in its embedding: token -> row.

    Args:
        model: the model.
        default: the vocabulary to take if the model has no tokenizer.
        rows: number of rows of its embedding.

    Raises:
        InputError: if it has a tokenizer, but no tokenizer.json.
    """
    folder = tokenizer_folder(model)
    found = read_vocabulary(folder)
    if found is None and any(path.name != "generation_config.json" for path in tokenizer_files(folder)):
        raise InputError(
            f"{folder}: its tokenizer has no {TOKENIZER} that can be read: tokens cannot be matched; save it as a fast "
            "one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return {token: number for token, number in (default if found is None else found).items() if number < rows}
