"""The vocabulary of a merge's result: which tokens it has, and in which row each one is.

`tokenizer_source` (or `tokenizer.source`) decides, in mergekit's words: `base`, one of the models, or `union`: the
base's tokens, and after them the tokens that only experts have. Rows are matched by the token's string. A model that
lacks a token takes the base's row, or if the base lacks it too, the mean over the models that have it, and 0 if none
has. So the base gets a row for every token, and a task vector is the difference to that row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.models.model import Model
from lewis.models.tokenizer import TOKENIZER, read_vocabulary, tokenizer_folder

logger = logging.getLogger(__name__)
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Target:
    """The vocabulary of a merge's result.

    Attributes:
        ids: token -> row.
        rows: number of rows of the embedding; those that belong to no token are padding.
        padded_from: the rows of padding from this one on are the mean of all tokens' rows.
        added: entries to add to `added_tokens` of the donor's tokenizer.json.
    """

    ids: Mapping[str, int]
    rows: int
    padded_from: int
    added: Sequence[Mapping[str, Any]] = ()

    def finish(self, folder: Path, source: Mapping[str, Any]) -> None:
        """Change the result's config and tokenizer files, copied from base and donor, to this vocabulary."""
        path = folder / "config.json"
        config = json.loads(path.read_bytes())
        before = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        changed = config | {key: source[key] for key in config.keys() & source.keys() if key.endswith("_token_id")}
        for block in (changed, *(value for value in changed.values() if isinstance(value, dict))):
            if before is not None and block.get("vocab_size") == before:
                block["vocab_size"] = self.rows
        path.write_text(json.dumps(changed, indent=2) + "\n")
        if self.added:
            _add_tokens(folder, self.added)


def union(base: Model, experts: Sequence[Model], vocabularies: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """The tokens that only experts have, as entries of `added_tokens` with ids after the base's.

    They are in the order of the experts, and those of one expert in the order of their ids.

    Args:
        base: the model whose tokenizer is added to.
        experts: sorted by their keys, so that their order in a recipe changes nothing.
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
    """The entry of `added_tokens` for a token that no model has."""
    return {"id": number, **_PLAIN, "content": token}


def _add_tokens(folder: Path, added: Sequence[Mapping[str, Any]]) -> None:
    path = folder / TOKENIZER
    content = json.loads(path.read_bytes())
    content["added_tokens"] = [*(content.get("added_tokens") or []), *added]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    settings = store.read_json(folder / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    if decoder and isinstance(decoder, dict):  # else it is copied as it is
        entries = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
        decoder |= entries
        changed = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(changed, encoding="utf-8")
