"""The chat template in a model's folder: found, chosen among several models', and replaced."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import InputError
from lewis.input_files import read_bytes, read_json
from lewis.recipe.tokenizer import AUTO, text_of

FILE, PROCESSOR, SETTINGS = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
_LIMIT = 1 << 22  # bytes of a template


def template_in(folder: Path) -> str | None:
    """The chat template that the tokenizer in a folder uses, wherever a version of transformers keeps it.

    Returns:
        None if it has none, or several by name and none of them is the `default`: transformers uses none of those
        unless a name is given. Also None if the file cannot be read.
    """
    with suppress(OSError, InputError, UnicodeDecodeError):
        return read_bytes(folder / FILE, _LIMIT).decode()
    for name in (PROCESSOR, SETTINGS):
        if found := _usable(folder / name):
            return found
    return None


def _usable(path: Path) -> str | None:
    found: Any = None
    with suppress(OSError, InputError):
        content = read_json(path)
        found = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(found, list):  # several, by name
        named = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def chosen_template(wanted: str | None, folders: Sequence[Path]) -> str | None:
    """The template that a recipe asks for, as Jinja text.

    Args:
        wanted: the recipe's `chat_template`; for `auto`, the template that most of the models have is chosen, of
            equally many the one that comes first.
        folders: of the models' tokenizers, the base's first.

    Returns:
        None if nothing is asked for, or no model has a template.
    """
    if wanted != AUTO:
        return None if wanted is None else text_of(wanted)
    counted = Counter(text.strip() for folder in dict.fromkeys(folders) if (text := template_in(folder)))
    return counted.most_common(1)[0][0] if counted else None


def write_template(folder: Path, template: str) -> None:
    """Give the tokenizer in a folder this chat template in place of its own."""
    (folder / FILE).write_text(template, encoding="utf-8")
    settings = store.read_json(folder / SETTINGS)
    if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
        (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
