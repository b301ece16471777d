"""References to models: how `model+adapter` is split, and what experts are called in tables."""

from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis.models.source import pin, pin_at, short_names
from lewis.recipe.block import parts_of
from tests.conftest import Family
from tests.support.local_hub import LocalHub


@pytest.mark.parametrize(
    "ref, parts",
    [
        ("org/base", ("org/base",)),
        ("org/base@v1+org/lora@v2", ("org/base@v1", "org/lora@v2")),
        ("./a+b+org/lora", ("./a+b", "org/lora")),
        ("./a+b", ("./a+b",)),
        ("./a+b+org/one@v1+org/two", ("./a+b", "org/one@v1", "org/two")),
        ("org/base+./a+b", ("org/base", "./a+b")),
    ],
)
def test_adapters_are_split_off_unless_a_folder_has_this_name(tmp_path: Path, ref: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "a+b").mkdir()
    assert parts_of(ref, tmp_path) == parts


def test_a_folder_in_the_home_folder_may_have_a_plus_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a+b").mkdir()
    assert parts_of("~/a+b+org/lora", tmp_path / "recipes") == ("~/a+b", "org/lora")


@pytest.mark.parametrize(
    "refs, names",
    [
        (["org/base@v1", "/models/math/", "org/base+org/lora@v2"], ["org/base@v1", "math", "lora"]),
        (["a/math", "b/math", "b/code"], ["a/math", "b/math", "code"]),
        (["a/champion", "b/code"], ["a/champion", "code"]),
    ],
)
def test_short_names(refs: list[str], names: list[str], tmp_path: Path) -> None:
    assert short_names(refs, tmp_path) == names


def test_a_model_is_pinned_to_what_it_was_elsewhere(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repo of the Hub that has moved since, an adapter with and without its base, a folder that has moved."""
    with LocalHub(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "client").items():
            monkeypatch.setenv(name, value)
        for name in ("base", "math", "lora"):
            hub.commit(f"org/{name}", getattr(family, name))
        base = pin("org/base", tmp_path)
        for ref in ("org/base", "org/math@main", "org/lora", "org/base+org/lora"):
            before = pin(ref, tmp_path, base)
            for name in ("base", "math", "lora"):  # they all move
                hub.commit(f"org/{name}", getattr(family, name))
            found = pin_at(ref, before.key, tmp_path, base)
            assert (found.key, found.ref, pin(ref, tmp_path, base).key != before.key) == (before.key, ref, True)
            with pytest.raises(InputError, match="org/"):
                pin_at(ref, "0" * 40, tmp_path, base)
    folder = pin(str(family.math), tmp_path)
    assert pin_at(str(family.math), folder.key, tmp_path).key == folder.key
    with pytest.raises(InputError, match="expected sha256:0, as where the run began, but on this machine it is sha256"):
        pin_at(str(family.math), "sha256:0", tmp_path)
