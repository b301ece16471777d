"""The chat template in a model's folder: found, chosen among several models', and replaced."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lewis import store
from lewis.recipe.chat_template import AUTO, text_of

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


def template_in(folder: Path) -> str | None:
    """The chat template of the tokenizer in a folder; None if it has none."""
    path = folder / FILE
    if path.is_file():
        return path.read_text()
    found = (store.read_json(folder / SETTINGS) or {}).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
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
    (folder / FILE).write_text(template)
    settings = store.read_json(folder / SETTINGS)
    if settings and settings.pop("chat_template", None) is not None:
        (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
