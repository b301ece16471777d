"""References to models: how `model+adapter` is split, and what experts are called in tables."""

from pathlib import Path

import pytest

from lewis.models.source import parts_of, short_names


@pytest.mark.parametrize(
    "ref, parts",
    [
        ("org/base", ("org/base",)),
        ("org/base@v1+org/lora@v2", ("org/base@v1", "org/lora@v2")),
        ("./a+b+org/lora", ("./a+b", "org/lora")),
        ("./a+b", ("./a+b",)),
        ("./a+b+org/one@v1+org/two", ("./a+b", "org/one@v1", "org/two")),
    ],
)
def test_adapters_are_split_off_unless_a_folder_has_this_name(tmp_path: Path, ref: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "a+b").mkdir()
    assert parts_of(ref, tmp_path) == parts


@pytest.mark.parametrize(
    "refs, names",
    [
        (["org/base@v1", "/models/math/", "org/base+org/lora@v2"], ["org/base@v1", "math", "lora"]),
        (["a/math", "b/math", "b/code"], ["a/math", "b/math", "code"]),
        (["a/champion", "b/code"], ["a/champion", "code"]),
    ],
)
def test_short_names(refs: list[str], names: list[str]) -> None:
    assert short_names(refs) == names
