"""Find the chat template in a model's folder, choose one among several models', and replace it."""

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
    """Return the chat template of the tokenizer in a folder, from any of the files where transformers keeps it.

    Returns:
        None if there is no template, if its file cannot be read, or if there are several named templates and none of
        them is the `default`: transformers uses one of those only by its name.
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
    """Return the chat template that a recipe asks for, as Jinja text.

    Args:
        wanted: the recipe's `chat_template`; for `auto`, the template that most of the models have is chosen, and
            in a tie the one that comes first.
        folders: the folders of the models' tokenizers, the base's first.

    Returns:
        None if nothing is asked for, or no model has a template.
    """
    if wanted != AUTO:
        return None if wanted is None else text_of(wanted)
    counted = Counter(text.strip() for folder in dict.fromkeys(folders) if (text := template_in(folder)))
    return counted.most_common(1)[0][0] if counted else None


def write_template(folder: Path, template: str) -> None:
    """Replace the chat template of the tokenizer in a folder."""
    (folder / FILE).write_text(template, encoding="utf-8")
    settings = store.read_json(folder / SETTINGS)
    if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
        (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
