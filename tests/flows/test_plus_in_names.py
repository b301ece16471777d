"""A folder with a `+` in its name is one model, and `folder+adapter` two, wherever a reference or a key is split."""

import shutil
from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis.inspection.draft import draft
from lewis.merging.export import to_mergekit
from lewis.models.source import commits_of, key_of, short_names
from lewis.recipe.documents import load_documents
from lewis.recipe.recipe import Recipe
from lewis.registry import releases
from lewis.registry.lineage import lineage_of, source_tag
from lewis.registry.registration import write_card
from lewis.steps.plan import make_plan
from lewis_flows import release_event
from lewis_flows.service.recipe_files import Folder
from tests.conftest import Family
from tests.support import pipeline

REFS = ["./my+base", "./math+a", "./my+base+./lo+ra"]
RECIPE = "{merge_method: ties, base_model: ./my+base, models: [{model: ./math+a}, {model: ./my+base+./lo+ra}]}\n"


@pytest.fixture
def folder(family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes, with a recipe of such models next to it."""
    path = tmp_path / "recipes"
    for source, name in ((family.base, "my+base"), (family.math, "math+a"), (family.lora, "lo+ra")):
        shutil.copytree(source, path / name)
    (path / "plus.yaml").write_text(RECIPE)
    monkeypatch.setenv("LEWIS_RECIPES", str(path))
    return path


def test_such_a_recipe_is_planned_merged_and_scheduled(folder: Path, tmp_path: Path) -> None:
    (file,) = Folder().files()
    assert (file.name, file.why) == ("plus", "")
    recipe = Recipe.load(folder / "plus.yaml")
    base, experts = pipeline.pin_all(recipe)
    assert base is not None
    plan = make_plan(recipe)
    names = [f"download {name}" for name in ("my+base", "math+a", "lo+ra")]
    assert dict.fromkeys(names, "cached").items() <= {step.name: step.state for step in plan.steps}.items()
    pipeline.preflight(recipe, base, experts)
    files = pipeline.download(base), [pipeline.download(each) for each in experts]
    written = pipeline.prepare_merge(recipe, *files).run(tmp_path / "merged")
    write_card(written, recipe, *files, None)
    card = (written.folder / "README.md").read_text()
    assert all(f"`{ref}`" in card and f"`{key}`" in card for ref, key in lineage_of(*files, ()).items())
    assert "base_model" not in card.split("---")[1]  # the front matter: they are not on the Hub
    with pytest.raises(InputError, match=r"math\+a: mergekit takes a \+ in a name .* rename the folder"):
        to_mergekit(recipe.text, recipe.config, recipe.lewis, base, experts, {})


def test_its_releases_are_seen(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(folder / "plus.yaml")
    assert list(release_event.hub_repos(recipe)) == []
    before = releases.heads(*pipeline.pin_all(recipe))
    assert [len(commits_of(before[ref])) for ref in REFS] == [1, 1, 2]
    assert before[REFS[2]] == key_of([before[REFS[0]], commits_of(before[REFS[2]])[1]])
    held = [releases.Held("1", "a" * 64, "passed", (), {source_tag(ref): key for ref, key in before.items()})]
    assert releases.moved(before, held, base=recipe.base_model, root=recipe.root) == []
    now = before | {REFS[2]: key_of([before[REFS[0]], "new"])}
    assert [(each.ref, each.repo) for each in releases.moved(now, held, base=recipe.base_model, root=recipe.root)] == [
        (REFS[2], str(folder / "lo+ra"))
    ]


def test_an_adapter_with_a_plus_in_its_name_moves_with_the_base(folder: Path) -> None:
    """It is no model with an adapter: that its base moved is reported once."""
    recipe = Recipe.parse(RECIPE.replace("./my+base+./lo+ra", "./lo+ra"), root=folder, name="plus")
    before = releases.heads(*pipeline.pin_all(recipe))
    held = [releases.Held("1", "a" * 64, "passed", (), {source_tag(ref): key for ref, key in before.items()})]
    now = before | {"./my+base": "new", "./lo+ra": key_of(["new", commits_of(before["./lo+ra"])[1]])}
    assert [each.ref for each in releases.moved(now, held, base=recipe.base_model, root=recipe.root)] == ["./my+base"]


def test_its_models_have_short_names(folder: Path) -> None:
    assert short_names(REFS, folder) == ["my+base", "math+a", "lo+ra"]


def test_drafts_and_several_recipes_in_one_file_take_it(folder: Path) -> None:
    made = draft(str(folder / "my+base"), [str(folder / "math+a"), str(folder / "lo+ra")], folder / "new.yaml")
    assert made.topics["./math+a"] == "gsm8k"
    other = "name: my\nmerge_method: linear\nmodels: [{model: org/a}]\nparameters: {weight: 0.5}\n---\n"
    (folder / "all.yaml").write_text(other + RECIPE.replace("./my+base", "my+base"))
    found = {each.name: each.recipe for each in load_documents(folder / "all.yaml", folder / "out")}
    assert [found["final"].base_model, *(each.model for each in found["final"].models)] == [
        "my+base",
        "./math+a",
        "my+base+./lo+ra",
    ]
