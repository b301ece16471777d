"""Vocabularies: which token has which row in each model, and which tokens a merge's result has.

`tokenizer_source` (or `tokenizer.source`) decides, in mergekit's words: `base`, one of the models, or `union`, the
base's tokens and after them what the experts have besides. Rows are matched by the token's string. Where a model lacks
a token, its row is the one of the only model that has it, else the base's, else the mean of those that have it, and 0
if none has: then no task vector of such a token tells of anything but training.
"""

from __future__ import annotations

import filecmp
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import InputError
from lewis.models.lora import LoraExpert, Model
from lewis.models.writer import tokenizer_files

logger = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
FIX = "to match embeddings by token, set tokenizer_source to base, union or a model"
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Target:
    """The vocabulary of a merge's result.

    Attributes:
        ids: token -> row.
        rows: of the embedding; those that are no token's are padding.
        padded_from: the first row of padding that is the mean of all tokens' rows.
        added: entries that the donor's tokenizer.json lacks, as its `added_tokens`.
    """

    ids: Mapping[str, int]
    rows: int
    padded_from: int
    added: Sequence[Mapping[str, Any]] = ()

    def finish(self, folder: Path, source: Mapping[str, Any]) -> None:
        """Make config and tokenizer files, copied to `folder` from base and donor, those of this vocabulary.

        Args:
            source: the config of the model whose tokenizer it is, for the ids of special tokens.
        """
        path = folder / "config.json"
        config = json.loads(path.read_text())
        before = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        changed = config | {key: source[key] for key in config.keys() & source.keys() if key.endswith("_token_id")}
        for block in (changed, *(value for value in changed.values() if isinstance(value, dict))):
            if before is not None and block.get("vocab_size") == before:
                block["vocab_size"] = self.rows
        path.write_text(json.dumps(changed, indent=2) + "\n")
        if self.added:
            _add_tokens(folder, self.added)


def tokenizer_folder(model: Model) -> Path:
    """Where a model's tokenizer is: an adapter may have brought its own."""
    if isinstance(model, LoraExpert):
        return model.folder if (model.folder / TOKENIZER).is_file() else model.base.folder
    return model.folder


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json, added tokens included; None if there is no such file.

    Raises:
        InputError: if it is damaged.
    """
    content = store.read_json(folder / TOKENIZER)
    if content is None:
        return None
    try:
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # a unigram's: [token, score] in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
        return {**vocabulary, **added}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / TOKENIZER}: no tokenizer: {error!r}; download it again") from error


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same tokenizer.json, byte by byte: much sooner known than what is in it."""
    try:
        return filecmp.cmp(one / TOKENIZER, other / TOKENIZER, shallow=False)
    except OSError:
        return False


def clash(base: Path, expert: Path) -> str | None:
    """What keeps the rows of two models from meaning the same: a token that has two ids, or an id that is two tokens.

    Args:
        base, expert: the folders of their tokenizers; one without a tokenizer.json uses the other's.
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
    """Token -> row of a model; a token without a row in its embeddings is none.

    Raises:
        InputError: if its tokenizer is of a kind that does not tell.
    """
    folder = tokenizer_folder(model)
    found = read_vocabulary(folder)
    if found is None and any(path.name != "generation_config.json" for path in tokenizer_files(folder)):
        raise InputError(
            f"{folder}: its tokenizer has no {TOKENIZER} that can be read: tokens cannot be matched; save it as a fast "
            "one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return {token: number for token, number in (default if found is None else found).items() if number < rows}


def union(base: Model, experts: Sequence[Model], vocabularies: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """What the experts' tokenizers have beyond the base's, as entries of `added_tokens` that go after the base's ids.

    Args:
        base: whose tokenizer is added to.
        experts: in the order of their keys, so that the order of a recipe changes nothing; each one's own tokens in
            the order of their ids.
        vocabularies: of the experts, token -> row.
    """
    known = read_vocabulary(tokenizer_folder(base)) or {}
    after = 1 + max(known.values(), default=-1)
    added: dict[str, dict[str, Any]] = {}
    for expert, vocabulary in zip(experts, vocabularies, strict=True):
        content = store.read_json(tokenizer_folder(expert) / TOKENIZER) or {}
        entries = {entry["content"]: entry for entry in content.get("added_tokens") or []}
        for token in sorted(vocabulary.keys() - known.keys(), key=lambda token: vocabulary[token]):
            entry = {**_PLAIN, **entries.get(token, {}), "content": token}
            first = added.setdefault(token, {**entry, "id": after + len(added)})
            if {**first, "id": 0} != {**entry, "id": 0}:
                logger.warning("the token %r is added with different settings; the first are used", token)
    return [{"id": entry["id"], **entry} for entry in added.values()]


def plain_entry(token: str, number: int) -> dict[str, Any]:
    """The entry of a token that no model has."""
    return {"id": number, **_PLAIN, "content": token}


def _add_tokens(folder: Path, added: Sequence[Mapping[str, Any]]) -> None:
    path = folder / TOKENIZER
    content = json.loads(path.read_text())
    content["added_tokens"] = [*(content.get("added_tokens") or []), *added]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    settings = store.read_json(folder / "tokenizer_config.json")
    if settings and settings.get("added_tokens_decoder"):
        entries = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
        settings["added_tokens_decoder"] |= entries
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
