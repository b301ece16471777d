"""Several recipes in one file: which are there, in which order, and what is refused."""

from pathlib import Path

import pytest

from lewis.errors import RecipeError
from lewis.recipe.documents import load_documents
from lewis.recipe.recipe import Recipe

FIRST = "name: first\nmerge_method: linear\nmodels: [{model: org/a}, {model: org/b}]\nparameters: {weight: 0.5}\n"
SECOND = "name: second\nmerge_method: slerp\nbase_model: first\nmodels: [{model: org/c}]\nparameters: {t: 0.5}\n"
UNNAMED = "merge_method: passthrough\nslices: [{sources: [{model: second+org/lora, layer_range: [0, 2]}]}]\n"


def load(folder: Path, *texts: str) -> list[tuple[str, Recipe]]:
    (folder / "all.yaml").write_text("---\n".join(texts))
    return [(each.name, each.recipe) for each in load_documents(folder / "all.yaml", folder / "out")]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_each_comes_after_those_whose_outputs_it_uses(order: tuple[int, ...], tmp_path: Path) -> None:
    texts = (FIRST, SECOND, UNNAMED)
    (one, first), (two, second), (last, third) = load(tmp_path, *(texts[i] for i in order))
    assert (one, two, last) == ("first", "second", "final")
    assert first.experts[0].model == "org/a" and second.base_model == str(tmp_path / "out" / "first")
    assert third.models[0].model == f"{tmp_path / 'out' / 'second'}+org/lora"
    assert (first.name, third.name, first.root) == ("first", "all", tmp_path)


def test_one_document_is_no_several(tmp_path: Path) -> None:
    assert load(tmp_path, FIRST) == []


WRONG = {
    "twice": ((FIRST, FIRST), "document 2: name: 'first' is given twice"),
    "two without": ((UNNAMED, UNNAMED), "document 2: name: more than one has none"),
    "no folder": ((FIRST, SECOND.replace("second", "../up")), "expected the name of a folder, got '../up'"),
    "a circle": ((FIRST.replace("org/a", "second"), SECOND), "first, second use each other's outputs"),
    "a recipe": ((FIRST, SECOND.replace("slerp", "slurp")), "second: merge_method: unknown method 'slurp'"),
    "no mapping": ((FIRST, "[1]\n"), "document 2: expected a mapping"),
    "a key twice": ((FIRST, "name: a\nname: b\n"), "given twice"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_documents_are_named(what: str, tmp_path: Path) -> None:
    texts, message = WRONG[what]
    with pytest.raises(RecipeError) as error:
        load(tmp_path, *texts)
    assert message in str(error.value)


def test_a_command_that_takes_one_recipe_says_what_takes_several(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(f"{FIRST}---\n{SECOND}")
    with pytest.raises(RecipeError, match=r"holds 2 recipes.*lewis merge"):
        Recipe.load(tmp_path / "all.yaml")
