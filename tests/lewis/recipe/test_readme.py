"""The recipe's README names every key of the schema, with its default and its choices, and no key that there is not."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lewis import recipe
from lewis.recipe.recipe import Recipe

README = (Path(recipe.__file__).parent / "README.md").read_text()
SECTIONS = {  # of a block, and what its keys begin with there
    "Recipe": ("Top level", ""),
    "ModelEntry": ("Models", ""),
    "OutputSlice": ("Slices", ""),
    "SliceSource": ("Slices", "sources.*."),
    "Tokenizer": ("Tokenizer", ""),
    "TokenEmbedding": ("Tokenizer", "tokens.*."),
    "TokenRow": ("Tokenizer", "tokens.*.source."),
    "Anchor": ("anchor", ""),
    "Lewis": ("lewis", ""),
    "CalibrationSet": ("calibrations", ""),
    "TokenWeights": ("calibrations", "weight."),
    "Importance": ("importance", ""),
    "Density": ("density", ""),
    "Refine": ("refine", ""),
    "Aim": ("aim", ""),
    "Output": ("output", ""),
    "Inspect": ("Whether models belong together", ""),
    "Evaluate": ("evaluate", ""),
    "Register": ("register", ""),
    "Gate": ("register", ""),
    "Judge": ("register", "judge."),
    "Publish": ("publish", ""),
    "WebhookTarget": ("serve", ""),
    "CommandTarget": ("serve", ""),
    "VllmTarget": ("serve", ""),
    "OpenaiTarget": ("serve", ""),
    "Check": ("serve", "check."),
    "HaproxyTarget": ("serve", ""),
    "KserveTarget": ("serve", ""),
    "Rule": ("serve", "rules.*."),
    "Search": ("search", ""),
    "SearchRange": ("search", ""),
}


def parts_of(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from parts_of(inner)


def blocks(block: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every block of the schema that can be inside this one, and itself, by the name of its class."""
    found = {block.__name__: block}
    for field in block.model_fields.values():
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel) and part.__name__ not in found:
                found |= blocks(part)
    return found


BLOCKS = blocks(Recipe)
FIELDS = [
    pytest.param(title, before + (field.alias or key), field, id=f"{name}.{field.alias or key}")
    for name, (title, before) in SECTIONS.items()
    for key, field in BLOCKS[name].model_fields.items()
]


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"no heading {title!r}"
    return found[1]


def rows(title: str) -> dict[str, str]:
    """Key -> its row, of the tables of keys in a section."""
    found = {}
    for table in re.findall(r"^\| key.*\n\|[- |]+\n((?:\|.*\n)+)", section(title), re.MULTILINE):
        for row in table.splitlines():
            for key in re.findall(r"`([^`]+)`", row.split("|")[1]):
                found[key] = row
    return found


def test_every_block_has_a_section() -> None:
    assert BLOCKS.keys() == SECTIONS.keys()


@pytest.mark.parametrize("title, key, field", FIELDS)
def test_every_key_has_a_row_with_its_default_and_its_choices(title: str, key: str, field: FieldInfo) -> None:
    row = rows(title).get(key)
    assert row is not None, f"no row for {key!r} under {title!r}"
    kind = row.split("|")[2]
    if isinstance(field.default, bool):
        assert kind.strip().startswith("true or false")
    if isinstance(field.default, str | bool | int | float):
        assert str(field.default).lower() in kind
    for part in parts_of(field.annotation):
        if get_origin(part) is Literal:
            assert all(f"`{choice}`" in section(title) for choice in get_args(part))


@pytest.mark.parametrize("title", sorted({title for title, _ in SECTIONS.values()}))
def test_no_row_is_of_a_key_that_there_is_not(title: str) -> None:
    assert rows(title).keys() <= {key for where, key, _ in (case.values for case in FIELDS) if where == title}
