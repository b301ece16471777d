"""What was released since the last merge: a real MLflow and a real Hub on loopback, and local folders."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis.errors import InputError, TransientError
from lewis.evaluation.gate import Verdict
from lewis.models.source import pin_all
from lewis.recipe.recipe import Recipe
from lewis.registry import lineage, promotion, releases
from lewis.registry.lineage import by_reference
from lewis.registry.releases import Moved
from lewis.reports.run_report import changes
from tests.conftest import Family
from tests.support.lineage import hub_of, make_home, registered
from tests.support.local_hub import LocalHub

RECIPE = """
merge_method: ties
base_model: org/base
models: [{model: org/math}, {model: org/code@main}]
register: {name: "tiny it's"}
"""
NAME, OLD, NEW = "tiny it's", "1" * 40, "2" * 40


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


@pytest.fixture
def hub(home: Path, tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with hub_of(family, home, tmp_path, monkeypatch, "lora") as hub:
        yield hub


def parse(text: str, root: Path) -> Recipe:
    return Recipe.parse(text, root=root, name="tiny")


def release(hub: LocalHub, repo: str, folder: Path) -> str:
    return hub.commit(repo, {p.name: p.read_bytes() for p in folder.iterdir()} | {"README.md": str(len(hub.log))})


def moved_of(recipe: Recipe, heads: dict[str, str], held: list[releases.Held]) -> list[Moved]:
    return releases.moved(heads, held, base=recipe.base_model, root=recipe.root)


def test_heads_are_the_commits_of_now_and_no_weights_are_downloaded(hub: LocalHub, tmp_path: Path) -> None:
    recipe = parse(RECIPE, tmp_path)
    commits = {name: hub.repos["model", f"org/{name}"].branches["main"] for name in ("base", "math", "code")}
    assert releases.heads(*pin_all(recipe)) == {
        "org/base": commits["base"],
        "org/math": commits["math"],
        "org/code@main": commits["code"],
    }
    new = hub.commit("org/code", {"config.json": "{}", "model.safetensors": b"x"})
    assert releases.heads(*pin_all(recipe))["org/code@main"] == new
    assert not [request for request in hub.log if request.path.endswith(".safetensors")]


def test_heads_of_adapters_and_folders(hub: LocalHub, tmp_path: Path, family: Family) -> None:
    shutil.copytree(family.code, tmp_path / "code")
    text = """
    merge_method: ties
    base_model: org/base
    models: [{model: org/lora}, {model: org/base+org/lora}, {model: code}]
    """
    recipe = parse(text, tmp_path)
    base, lora = (hub.repos["model", f"org/{name}"].branches["main"] for name in ("base", "lora"))
    heads = releases.heads(*pin_all(recipe))
    assert heads["org/lora"] == heads["org/base+org/lora"] == f"{base}+{lora}"
    (tmp_path / "code" / "README.md").write_text("no input of a merge")
    assert releases.heads(*pin_all(recipe)) == heads
    config = tmp_path / "code" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"released": 2}))
    again = releases.heads(*pin_all(recipe))
    assert again["code"].startswith("sha256:") and again["code"] != heads["code"]


def test_heads_that_cannot_be_asked_are_errors(hub: LocalHub, tmp_path: Path) -> None:
    recipe = parse(RECIPE, tmp_path)
    hub.faults.append({"path": "org/math", "status": 503, "times": 99})
    with pytest.raises(TransientError, match="org/math"):
        releases.heads(*pin_all(recipe))
    with pytest.raises(InputError, match="org/none"):
        releases.heads(*pin_all(parse(RECIPE.replace("org/math", "org/none"), tmp_path)))


def test_merged_tells_of_every_version_what_it_holds(home: Path, family: Family) -> None:
    assert releases.merged(NAME) == []
    first = registered(family.base, "a", {"org/base": OLD, "/data/math 100%": NEW, "calibration:words": "c" * 64}, NAME)
    second = registered(family.base, "b", {"org/base": NEW}, NAME)
    promotion.promote(first, Verdict(True, (), "base"))
    promotion.promote(second, Verdict(False, (), first.uri))
    newest, oldest = releases.merged(NAME)
    assert (newest.version, newest.digest, newest.verdict, newest.aliases) == ("2", "b" * 64, "failed", ("challenger",))
    assert (oldest.version, oldest.digest, oldest.verdict, oldest.aliases) == ("1", "a" * 64, "passed", ("champion",))
    assert oldest.commit_of("org/base") == OLD and oldest.commit_of("/data/math 100%") == NEW
    assert newest.commit_of("/data/math 100%") is None
    assert releases.merged("another") == []


def test_inputs_whose_tags_would_be_one_are_kept_apart(home: Path, family: Family) -> None:
    """The first two differ only behind the longest name that a tag may have, the others in a sign it may not have."""
    long = "/data/" + 12 * "a-folder-with-a-long-name/"
    heads = {f"{long}math": OLD, f"{long}code": NEW, "./a+b": OLD, "./a_b": NEW, "org/base": OLD}
    registered(family.base, "a", heads, NAME)
    [held] = releases.merged(NAME)
    assert {ref: held.commit_of(ref) for ref in heads} == heads
    assert by_reference(held.sources, heads) == heads and lineage.source_tag("org/base") in held.sources
    assert releases.moved(heads, [held], base=None, root=home) == []


def test_a_version_is_known_by_every_name_of_its_inputs(home: Path, family: Family) -> None:
    """The same files by another path, or branch: the merge is the same, so there is no other version to hold them."""
    before, now = {"org/base": OLD, "org/math": NEW}, {"org/base": OLD, "org/math@main": NEW}
    for heads in (before, now, before):
        registered(family.base, "a", heads, NAME)
        [held] = releases.merged(NAME)
        assert releases.moved(heads, [held], base=None, root=home) == []
    assert releases.moved(now, [held], base=None, root=home) == []
    report = changes(by_reference(held.sources, now), now)
    assert [(each.ref, each.status) for each in report] == [("org/base", "unchanged"), ("org/math@main", "unchanged")]


def test_what_lost_its_files_or_is_not_ours_holds_nothing(home: Path, family: Family) -> None:
    import mlflow

    made = registered(family.base, "a", {"org/base": OLD}, NAME)
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    client.create_model_version(made.name, source="/elsewhere")
    assert [held.version for held in releases.merged(NAME)] == ["1"]
    client.delete_model_version_tag(made.name, "1", "lewis.digest")  # as the registry does when files are lost
    assert releases.merged(NAME) == []


def test_a_registry_that_does_not_answer_is_transient(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match="reading the versions of tiny"):
        releases.merged("tiny")


def test_from_the_first_merge_over_a_release_to_nothing_new(hub: LocalHub, tmp_path: Path, family: Family) -> None:
    recipe = parse(RECIPE, tmp_path)
    heads = releases.heads(*pin_all(recipe))
    never = moved_of(recipe, heads, releases.merged(NAME))
    assert never == [Moved("org/math", "org/math", None, heads["org/math"])]

    registered(family.base, "a", heads, NAME)
    assert moved_of(recipe, heads, releases.merged(NAME)) == []
    new = release(hub, "org/code", family.code)
    now = releases.heads(*pin_all(recipe))
    (moved,) = moved_of(recipe, now, releases.merged(NAME))
    assert moved == Moved("org/code@main", "org/code", heads["org/code@main"], new)

    registered(family.base, "b", now, NAME)
    assert moved_of(recipe, now, releases.merged(NAME)) == []
    # The history does not say which of the two was judged last.
    assert moved_of(recipe, heads, releases.merged(NAME)) == []


def test_a_release_that_was_taken_back_is_judged_once_more(home: Path, family: Family) -> None:
    """The champion kept the weights that the author had taken back, as a version with the earlier ones was judged."""
    before, after = ({"org/base": OLD, "org/math": commit} for commit in (OLD, NEW))

    def moved(heads: dict[str, str]) -> list[Moved]:
        return releases.moved(heads, releases.merged(NAME), base="org/base", root=home)

    first, second = (registered(family.base, each, heads, NAME, None) for each, heads in (("a", before), ("b", after)))
    promotion.promote(first, Verdict(True, (), "base"))
    promotion.promote(second, Verdict(True, (), first.uri))
    assert moved(after) == []
    assert moved(before) == [Moved("org/math", "org/math", NEW, OLD)]
    promotion.promote(first, Verdict(False, ("worse: fail",), second.uri))
    assert moved(before) == []  # rejected: not at each poll
    assert moved(after) == []  # the champion has these
    promotion.rollback(NAME, "rude")
    assert moved(before) == moved(after) == []  # the champion again; withdrawn
    third = registered(family.base, "c", {**before, "org/math": "3" * 40}, NAME, None)
    promotion.promote(third, Verdict(False, (), first.uri))
    assert moved(before) == moved(after) == []


def test_a_version_of_another_recipe_of_the_group_is_no_later_release(home: Path) -> None:
    mine, other = ({lineage.source_tag(ref): OLD} for ref in ("org/math", "org/code"))
    held = [
        releases.Held("2", "b" * 64, "passed", ("champion",), other, judged="2026-01-02"),
        releases.Held("1", "a" * 64, "failed", (), mine, judged="2026-01-01"),
    ]
    assert releases.moved({"org/math": OLD}, held, base=None, root=home) == []


def test_a_version_whose_run_died_before_its_verdict_is_given(home: Path, tmp_path: Path, family: Family) -> None:
    recipe = parse(RECIPE, tmp_path)
    heads = dict.fromkeys(("org/base", "org/math", "org/code@main"), NEW)
    registered(family.base, "a", heads, NAME, verdict=None)
    assert moved_of(recipe, heads, releases.merged(NAME)) == [Moved("org/math", "org/math", NEW, NEW)]


def test_an_expert_that_is_new_in_the_recipe_is_given(home: Path, tmp_path: Path, family: Family) -> None:
    registered(family.base, "a", {"org/base": OLD, "org/math": OLD}, NAME)
    heads = {"org/base": OLD, "org/math": OLD, "org/code@main": NEW}
    found = moved_of(parse(RECIPE, tmp_path), heads, releases.merged(NAME))
    assert found == [Moved("org/code@main", "org/code", None, NEW)]


ADAPTERS = "{merge_method: ties, base_model: org/base, models: [{model: org/lora}, {model: org/b+org/a}]}"


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"org/base": "B2", "org/lora": "B2+L1"}, [("org/base", "org/base")]),
        ({"org/lora": "B1+L2"}, [("org/lora", "org/lora")]),
        ({"org/base": "B2", "org/lora": "B2+L2"}, [("org/base", "org/base"), ("org/lora", "org/lora")]),
        ({"org/b+org/a": "X2+Y1"}, [("org/b+org/a", "org/b")]),
        ({"org/b+org/a": "X1+Y2"}, [("org/b+org/a", "org/a")]),
    ],
)
def test_the_part_of_an_adapter_that_moved(
    home: Path, tmp_path: Path, now: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    before = {"org/base": "B1", "org/lora": "B1+L1", "org/b+org/a": "X1+Y1"}
    sources = {f"lewis.source.{ref.replace('/', '--').replace('+', '_')}": key for ref, key in before.items()}
    held = [releases.Held("1", "a" * 64, "passed", (), sources)]
    found = moved_of(parse(ADAPTERS, tmp_path), before | now, held)
    assert [(each.ref, each.repo) for each in found] == expected


def test_the_repo_of_a_folder_is_its_path(home: Path, tmp_path: Path, family: Family) -> None:
    recipe = parse(f"{{merge_method: ties, base_model: org/base, models: [{{model: {family.code}}}]}}", tmp_path)
    (moved,) = moved_of(recipe, {"org/base": OLD, str(family.code): NEW}, [])
    assert moved == Moved(str(family.code), str(family.code.resolve()), None, NEW)
