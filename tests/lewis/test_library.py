"""The front door: what `import lewis` gives a notebook."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import lewis
from lewis import store
from lewis.errors import InputError, RecipeError
from lewis.registry import retention
from lewis.store import kinds, runs
from tests.conftest import Family
from tests.support.word_tasks import WRITES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    data = {
        "merge_method": "ties",
        "base_model": str(family.base),
        "models": [{"model": str(path)} for path in family.experts],
        "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "recipe.yaml"


def test_a_merge_gives_what_was_merged_with_its_card(recipe: Path, tmp_path: Path, family: Family) -> None:
    seen: list[tuple[str, int, int]] = []
    merged = lewis.merge(str(recipe), tmp_path / "merged", report=lambda *step: seen.append(step))
    assert merged.folder == tmp_path / "merged" and (merged.folder / "model.safetensors").is_file()
    assert merged.size and set(merged.mean_density) == {str(path) for path in family.experts}
    assert merged.card == (merged.folder / "README.md").read_text() != ""
    assert merged.manifest["digest"] == merged.digest and merged.adapter is None and merged.fit == ""
    assert {f"{family.math} on sums", "model.norm.weight"} <= {what for what, _, _ in seen}
    assert all(0 <= done <= total for _, done, total in seen)
    assert lewis.merge(lewis.Recipe.load(recipe), tmp_path / "again").digest == merged.digest


def test_what_a_long_merge_has_used_stays(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process with a quota removed what it had measured hours before, and what it was to read."""
    home, left = store.home(), list[tuple[int, int]]()

    def hours_ago(path: Path, hours: float) -> None:
        os.utime(path, (time.time() - 3600 * hours,) * 2)

    def report(what: str, done: int, total: int) -> None:
        if what == "model.norm.weight":
            (note,) = runs.notes()
            hours_ago(note, 5)
            entries = [path for kind in (kinds.IMPORTANCE, kinds.ALLOCATIONS) for path in kind.entries()]
            for path in entries:
                hours_ago(path, 4)
            with monkeypatch.context() as patch:
                patch.setenv("LEWIS_QUOTA", "1kB")
                retention.make_room(10**6)
            left.append((len(entries), sum(path.exists() for path in entries)))

    (home / "runs").mkdir(parents=True)
    (home / "runs" / "library-of-a-dead-process").touch()
    lewis.merge(recipe, tmp_path / "merged", report=report)
    assert left == [(4, 4)] and runs.notes() == [] and runs.active_since() is None


def test_densities_need_no_room_for_the_merged_model(recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lewis.store.files._free", lambda folder: (0 if folder == home / "merged" else 10**9, False))
    assert lewis.allocate(recipe).means


def test_each_step_by_itself(recipe: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = lewis.measure(recipe)
    assert [entry.ref for entry in measured] == [str(path) for path in (family.base, *family.experts)]
    assert measured[0].norms and measured[0].moments
    monkeypatch.setattr("lewis.importance.measure.measure_sets", None)  # what the store has is not measured again
    allocated = lewis.allocate(recipe)
    assert allocated.experts()[str(family.math)].densities["model.layers.0.mlp.up_proj.weight"] > 0
    states = {step.name: step.state for step in lewis.plan(recipe).steps}
    assert states["allocate"] == "cached" and states["merge experts"] == "to do"
    assert lewis.inspect(recipe).verdict.startswith("no findings")


def test_what_a_recipe_has_not_is_said(recipe: Path, tmp_path: Path) -> None:
    plain = yaml.safe_load(recipe.read_text())
    del plain["lewis"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    for function in (lewis.measure, lewis.allocate):
        with pytest.raises(RecipeError, match="lewis: missing"):
            function(tmp_path / "plain.yaml")
    with pytest.raises(RecipeError, match="evaluate: missing"):
        lewis.score(tmp_path / "plain.yaml", tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'merges'"):
        lewis.merges  # noqa: B018


def test_a_recipe_that_is_neither_a_file_nor_a_recipe_is_refused(recipe: Path) -> None:
    """It was a TypeError of pathlib."""
    for given in (yaml.safe_load(recipe.read_text()), None, b"recipe.yaml"):
        with pytest.raises(InputError, match=r"expected the path of a YAML file or a lewis.Recipe, got \w+; lewis.Rec"):
            lewis.plan(given)  # type: ignore[arg-type]


def test_arguments_of_another_kind_are_told(recipe: Path, tmp_path: Path) -> None:
    """A folder as text gave a recipe that no merge took; the others were tracebacks, or read text letter by letter."""
    parsed = lewis.Recipe.parse(recipe.read_text(), root=str(recipe.parent))
    assert lewis.merge(parsed, tmp_path / "out").digest
    with pytest.raises(InputError, match="folder: expected the path of the output, got None"):
        lewis.merge(recipe, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^folder a\0b: cannot be written"):  # it named the option `-o`
        lewis.merge(recipe, "a\0b")
    with pytest.raises(InputError, match=r"candidates: expected a list of references, got 'a/b'; give \['a/b'\]"):
        lewis.inspect(recipe, candidates="a/b")
    with pytest.raises(InputError, match=r"candidates: expected a list of references, got '3'"):
        lewis.inspect(recipe, candidates=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="folder: expected the path of a model, got None"):
        lewis.score(recipe, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="~nobodyhere/x: no such folder"):
        lewis.score(lewis.Recipe.parse(f"{parsed.text}\nevaluate: {{tasks: [x]}}", root=recipe.parent), "~nobodyhere/x")
    with pytest.raises(InputError, match="text: expected YAML or JSON text, got dict; json"):
        lewis.Recipe.parse({"merge_method": "ties"}, root=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"overrides: expected a list of settings, got 'dtype=float32'; give \['dtyp"):
        lewis.Recipe.load(recipe, "dtype=float32")
    with pytest.raises(InputError, match=r"overrides: expected a list of settings, got None; give \[\]"):
        lewis.Recipe.load(recipe, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="root: expected the path of a folder, got None"):
        lewis.Recipe.parse(recipe.read_text(), root=None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="'None': no such file"):
        lewis.Recipe.load(None)  # type: ignore[arg-type]


def test_a_recipe_keeps_its_folder_when_the_notebook_goes_to_another(
    recipe: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.base.parent)
    text = recipe.read_text().replace(f"{family.base.parent}/", "./")
    parsed = lewis.Recipe.parse(text, root=".")
    monkeypatch.chdir(tmp_path)
    assert len(lewis.plan(parsed).inputs) == 3


def test_the_size_of_a_file_is_checked_before_the_work(recipe: Path, tmp_path: Path) -> None:
    """`5GB`, as transformers takes it, was a TypeError once all was measured and fitted."""
    seen: list[str] = []
    for wrong in ("much", 0, -1, None):
        with pytest.raises(InputError, match=r"max_shard_size: expected a size such as 5GB or 500MB, got "):
            lewis.merge(recipe, tmp_path / "x", max_shard_size=wrong, report=lambda what, *_: seen.append(what))  # type: ignore[arg-type]
    assert not seen and not (tmp_path / "x").exists()
    merged = lewis.merge(recipe, tmp_path / "x", max_shard_size="10KB")
    assert len(list(merged.folder.glob("*.safetensors"))) > 1


def test_a_candidate_may_be_a_path(recipe: Path, family: Family) -> None:
    assert lewis.inspect(recipe, candidates=[family.math]).verdict.startswith("no findings")


def test_a_merged_adapter_is_scored_on_the_base_of_its_recipe(recipe: Path, tmp_path: Path, family: Family) -> None:
    """It was refused, with the advice to set the base that the recipe has."""
    (tmp_path / "words.jsonl").write_text('{"question": "w1", "answer": "w2"}\n{"question": "w3", "answer": "w2"}\n')
    (tmp_path / "writes.yaml").write_text(WRITES)
    data = yaml.safe_load(recipe.read_text()) | {"evaluate": {"tasks": ["writes.yaml"]}}
    data |= {"output": {"kind": "lora", "rank": 4}, "exclude": ["norm"]}
    recipe.write_text(yaml.safe_dump(data))
    merged = lewis.merge(recipe, tmp_path / "adapter")
    assert merged.adapter is not None
    working: list[int] = []
    [score] = lewis.score(recipe, merged.folder, report=lambda *_: working.append(len(runs.notes())))
    assert (score.key, score.samples) == ("writes/exact_match,none", 2)
    assert working and set(working) == {1}, "what a long evaluation has used is not removed meanwhile"


def test_the_import_is_light_and_typed() -> None:
    heavy = "('torch', 'pydantic', 'yaml', 'prefect')"
    code = f"import lewis, sys; print([m for m in {heavy} if m in sys.modules], dir(lewis))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] [") and all(f"'{name}'" in out for name in lewis.__all__)
    assert (Path(lewis.__file__).parent / "py.typed").is_file()
