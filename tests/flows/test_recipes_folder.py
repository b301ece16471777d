"""Where the recipes are: a folder that is named, that of a checkout, or one in the store, made at first use."""

import importlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from lewis.errors import InputError
from lewis.methods import METHODS
from lewis.recipe.recipe import Recipe
from lewis.registry.registration import flat_parameters
from lewis_flows import merge, recipes_folder
from lewis_flows.service import receiver
from lewis_flows.service.recipe_files import Folder
from lewis_tasks.support.assets import artifact_key

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the package were installed from a wheel; gives the store."""
    monkeypatch.delenv("LEWIS_RECIPES", raising=False)
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    shipped = shutil.copytree(REPO / "deployments", tmp_path / "site-packages" / "lewis_flows" / "shipped")
    monkeypatch.setattr(recipes_folder, "SHIPPED", shipped)
    return tmp_path / "home"


def test_a_checkout_has_its_own_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEWIS_RECIPES", raising=False)
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path))
    recipes_folder.make()
    assert recipes_folder.folder() == REPO / "deployments" / "recipes"
    assert recipes_folder.names() == [] and not (tmp_path / "recipes").exists()  # an example lacks its models


def test_the_store_has_it_where_a_wheel_is_installed(installed: Path) -> None:
    with pytest.raises(InputError, match=r"lewis up.*LEWIS_RECIPES"):
        recipes_folder.folder()
    recipes_folder.make()
    folder = recipes_folder.folder()
    assert folder == installed / "recipes" and recipes_folder.names() == []
    assert (folder / "tasks" / "gsm8k_generate.yaml").is_file() and (folder / "tasks" / "programs.py").is_file()
    assert [path for path in installed.iterdir() if path.name.endswith(".partial")] == []


def test_what_the_user_has_there_is_left_alone(installed: Path) -> None:
    (installed / "recipes").mkdir(parents=True)
    recipes_folder.make()
    assert list((installed / "recipes").iterdir()) == []


ONE = "{merge_method: linear, models: [{model: org/a}, {model: org/b}], register: {name: tiny%s}}"


@pytest.mark.parametrize(
    "first, second, refused",
    [
        ("", "", True),
        (", group: team", "", True),
        (", group: team", ", group: crew", True),
        (", group: team", ", group: team", False),
        ("", "er", False),
    ],
)
def test_two_recipes_of_one_name_are_refused_or_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, refused: bool
) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    for name, rest in (("one", first), ("two", second)):
        (tmp_path / f"{name}.yaml").write_text(ONE % rest)
    assert sorted(recipes_folder.load_all()) == ([] if refused else ["one", "two"])
    if refused:
        with pytest.raises(InputError, match=r"'tiny' is registered by one.yaml and by two.yaml.*`register.group`"):
            recipes_folder.load("one")
    (tmp_path / "two.yaml").write_text("register: {name: tiny}\n[a")  # a file that is wrong still says what it means
    with pytest.raises(InputError, match=r"by two\.yaml"):
        recipes_folder.load("one")
    (tmp_path / "two.yaml").unlink()
    assert sorted(recipes_folder.load_all()) == ["one"]


def test_names_in_another_script_do_not_refuse_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    for number, name in enumerate(("数学", "代码")):
        (tmp_path / f"{name}.yaml").write_text(ONE.replace("tiny", f"tiny{number}") % "")
    assert sorted(recipes_folder.load_all()) == sorted(("数学", "代码"))


def test_a_recipe_that_could_not_be_read_still_refuses_another_of_its_name_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the files say was kept as long as their names, sizes and times of writing were the same."""
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(ONE % "")
    with monkeypatch.context() as patch:
        patch.setattr(recipes_folder, "read_bytes", Mock(side_effect=PermissionError))
        recipes_folder.load("one")
    (tmp_path / "two.yaml").chmod(0o600)
    with pytest.raises(InputError, match=r"'tiny' is registered by one.yaml and by two.yaml"):
        recipes_folder.load("one")


def test_two_teams_may_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    for name, team in (("one", ", team: research"), ("two", ", team: ops"), ("three", "")):
        (tmp_path / f"{name}.yaml").write_text(ONE % team)
    assert sorted(recipes_folder.load_all()) == ["one", "three", "two"]
    assert recipes_folder.registered_name("one") == recipes_folder.load("one").register_as.model == "research.tiny"
    (tmp_path / "three.yaml").write_text(ONE % ", team: ops")
    with pytest.raises(InputError, match=r"'ops.tiny' is registered by two.yaml and by three.yaml"):
        recipes_folder.load("two")
    (tmp_path / "three.yaml").write_text(ONE.replace("tiny", "ops.tiny") % "")  # the same name in MLflow
    assert sorted(recipes_folder.load_all()) == ["one"]
    (tmp_path / "one.yaml").write_text("register: {name: tiny, team: research}\n[a")
    assert recipes_folder.registered_name("one") == "research.tiny"


def test_a_team_is_no_part_of_what_is_merged(tmp_path: Path) -> None:
    plain, of_team = Recipe.parse(ONE % "", root=tmp_path), Recipe.parse(ONE % ", team: ops", root=tmp_path)
    assert plain.blocks == of_team.blocks and flat_parameters(plain).keys() < flat_parameters(of_team).keys()
    assert (artifact_key(plain, "kept"), artifact_key(of_team, "kept")) == ("recipe-kept", "ops-recipe-kept")
    with pytest.raises(InputError, match=r"register\.team"):
        Recipe.parse(ONE % ", team: Ops/One", root=tmp_path)


def test_a_copy_elsewhere_does_not_take_the_champion_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    for path in (tmp_path / "copy.yaml", tmp_path / "recipes" / "one.yaml"):
        path.write_text(ONE % "")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    copy = tmp_path / "copy.yaml"
    with pytest.raises(InputError, match=r"by copy.yaml and by one.yaml"):
        recipes_folder.check_alone(copy, Recipe.load(copy))
    recipes_folder.check_alone(copy, Recipe.load(copy, ["register.name=tried"]))
    recipes_folder.check_alone(tmp_path / "recipes" / ".." / "recipes" / "one.yaml", recipes_folder.load("one"))


def test_the_example_is_a_valid_recipe_once_it_is_copied(installed: Path) -> None:
    recipes_folder.make()
    copy = recipes_folder.folder() / "my-merge.yaml"
    copy.write_text((recipes_folder.folder() / recipes_folder.EXAMPLE).read_text())
    assert recipes_folder.names() == ["my-merge"]
    assert isinstance(recipes_folder.load("my-merge"), Recipe)


def test_a_wrong_setting_is_told_and_its_folder_not_made(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipse"))
    recipes_folder.make()
    with pytest.raises(InputError, match="recipse: LEWIS_RECIPES names no folder"):
        recipes_folder.folder()


RECIPE = """
merge_method: linear
models: [{model: org/a}, {model: org/b}]
evaluate: {tasks: [gsm8k], allow_code_execution: %s}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes `quiet` and `code`, and a file outside of it."""
    path = tmp_path / "recipes"
    path.mkdir()
    (path / "quiet.yaml").write_text(RECIPE % "false")
    (path / "code.yaml").write_text(RECIPE % "true")
    (tmp_path / "evil.yaml").write_text(RECIPE % "true")
    monkeypatch.setenv("LEWIS_RECIPES", str(path))
    monkeypatch.chdir(path)
    return path


def test_a_path_is_taken_from_the_command_line_only(folder: Path) -> None:
    evil = folder.parent / "evil.yaml"
    for given in (str(evil), "../evil.yaml", "../evil", "./quiet.yaml", "quiet.yaml", "~/evil.yaml", ".", "", "evil"):
        with pytest.raises(InputError, match=r"is not the name of a recipe in .*a run of a deployment takes only such"):
            recipes_folder.find(given, paths=False)
    assert recipes_folder.find("quiet", paths=False) == folder / "quiet.yaml"
    assert recipes_folder.find(str(evil)) == evil


def test_overrides_of_a_deployment_allow_no_code(folder: Path) -> None:
    load = recipes_folder.load_for_deployment
    quiet, code = folder / "quiet.yaml", folder / "code.yaml"
    assert load(quiet, ["evaluate.limit=3"]).evaluate.limit == 3  # type: ignore[union-attr]
    assert load(code, ["evaluate.limit=3"]).evaluate.allow_code_execution  # type: ignore[union-attr]
    assert not load(code, ["evaluate={tasks: [x]}"]).evaluate.allow_code_execution  # type: ignore[union-attr]
    for path, override in (
        (quiet, "evaluate.allow_code_execution=true"),
        (quiet, "evaluate={tasks: [/tmp/evil.yaml], allow_code_execution: true}"),
        (code, "evaluate.tasks=[gsm8k, /tmp/evil.yaml]"),
    ):
        with pytest.raises(InputError, match=r"overrides: a run of a deployment cannot change evaluate\.allow_code"):
            load(path, [override])
    with pytest.raises(InputError, match=r"cannot change evaluate\.model_args\.trust_remote_code"):
        load(code, ["evaluate.model_args={trust_remote_code: true}"])
    published = ["register={name: x}", "publish={repo: evil/x}"]
    with pytest.raises(InputError, match="cannot change publish"):
        load(quiet, published)


@pytest.mark.parametrize("flow", ["merge", "search"])
@pytest.mark.parametrize("given", ["/tmp/evil.yaml", "../evil.yaml"])
def test_a_deployed_flow_refuses_a_path(folder: Path, flow: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"lewis_flows.{flow}")
    monkeypatch.setattr("lewis_flows.merge.deployment", SimpleNamespace(id="some"))
    state = getattr(module, f"{flow}_flow").fn(given)
    assert state.is_failed() and "a run of a deployment takes only such names" in state.message


GOOD = "{merge_method: ties, base_model: org/base, models: [{model: org/math}]}"
BAD = {
    "deep.yaml": "[" * 2000,
    "laughs.yaml": "a: &a [x, x]\nb: &b [*a, *a]\nmerge_method: [*b, *b]",
    "number.yaml": "seed: 2024-13-45",
    "large.yaml": "#" * 1_000_001,
    "binary.yaml": b"\xff\xfe\x00",
    "long.yaml": GOOD.replace("org/math", "a+" + "x" * 300),  # longer than the system allows a name to be
    "nul.yaml": GOOD.replace("org/math", '"./a\\0b"'),
    "{{ prefect.variables.x }}.yaml": GOOD,
    "\udcff.yaml": GOOD,
    ".hidden.yaml": GOOD,
    "plugin.yaml": GOOD.replace("ties", "raises"),
}


@pytest.fixture
def with_bad_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes that are wrong in every way, and of one that is fine."""

    def check(values: Any, experts: int) -> str:
        raise KeyError("what nobody thought of")

    monkeypatch.setitem(METHODS, "raises", replace(METHODS["ties"], name="raises", check=check))
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, content in {"good.yaml": GOOD, **BAD}.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("LEWIS_RECIPES", str(folder))
    return folder


def test_a_bad_recipe_stops_no_other(with_bad_ones: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = recipes_folder.load_all()
    assert {"good"} <= set(found) <= {"good", "long", "nul"}
    told = caplog.text
    assert "recipe deep is left out: deep: not valid YAML: nested more than 50 deep" in told
    assert "large.yaml: expected at most 1,000,000 bytes" in told
    assert "recipe plugin is left out: KeyError: 'what nobody thought of'" in told
    assert r"recipe '\udcff.yaml' is left out: expected a name of letters" in told
    assert "good" in [each.name for each in Folder().files() if not each.why]


def test_a_delivery_for_a_good_recipe_is_taken(
    with_bad_ones: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = []
    monkeypatch.setattr(receiver, "announce", lambda *given: announced.append(given) or "id")
    body = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": "org/math"},
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": None, "newSha": "f" * 40}],
    }
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        status, answer = receiver.Receiver().take(json.dumps(body).encode())
    assert (status, answer["recipes"]) == (202, ["good"]) and announced[0][0] == "good"


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "no/such/file.yaml"])
def test_a_path_that_is_none_is_told(with_bad_ones: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        recipes_folder.find(name)
    monkeypatch.setenv("LEWIS_RECIPES", "~nobody-of-that-name/x")
    with pytest.raises(InputError, match="LEWIS_RECIPES: "):
        recipes_folder.names()


def test_two_files_of_one_name_are_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which of them was run depended on the order of the folder."""
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    for name in ("tiny.yaml", "tiny.yml", "other.yaml"):
        (tmp_path / name).write_text("{merge_method: linear, models: [{model: a, parameters: {weight: 1.0}}]}")
    with pytest.raises(InputError, match=r"recipe: both tiny\.ya?ml and tiny\.ya?ml in .*; rename one of them"):
        recipes_folder.find("tiny")
    assert [*recipes_folder.load_all()] == ["other"] and caplog.text.count("recipe tiny is left out") == 1


@pytest.mark.parametrize(
    ("recipe", "name"), [("qwen2.5", "merge qwen2.5"), ("good", "merge good"), ("/x/y/qwen2.5.yaml", "merge qwen2.5")]
)
def test_a_run_has_the_whole_name_of_its_recipe(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of a release of `qwen2.5` was `merge qwen2` until it knew what moved, and stayed so if it failed."""
    given = SimpleNamespace(flow_name="merge", parameters={"recipe": recipe})
    monkeypatch.setattr(merge, "flow_run", given)
    assert merge.run_name() == name
