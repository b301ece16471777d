"""Where the recipes are: a folder that is named, that of a checkout, or one in the store, made at first use."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from lewis.errors import InputError
from lewis.recipe.recipe import Recipe
from lewis_flows import recipes_folder

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the package were installed from a wheel; gives the store."""
    monkeypatch.delenv("LEWIS_RECIPES", raising=False)
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    shipped = tmp_path / "site-packages" / "lewis_deployments"
    shipped.parent.mkdir()
    shipped.symlink_to(REPO / "deployments")
    monkeypatch.setattr(recipes_folder, "SHIPPED", shipped)
    return tmp_path / "home"


def test_a_checkout_has_its_own_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEWIS_RECIPES", raising=False)
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path))
    recipes_folder.make()
    assert recipes_folder.folder() == REPO / "deployments" / "recipes"
    assert "smollm2" in recipes_folder.names() and not (tmp_path / "recipes").exists()


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
    published = ["register={name: x}", "publish={repo: evil/x}"]
    with pytest.raises(InputError, match="cannot change publish"):
        load(quiet, published)


@pytest.mark.parametrize("flow", ["merge", "search"])
@pytest.mark.parametrize("given", ["/tmp/evil.yaml", "../evil.yaml"])
def test_a_deployed_flow_refuses_a_path(folder: Path, flow: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"lewis_flows.{flow}")
    monkeypatch.setattr(module, "deployment", SimpleNamespace(id="some"))
    state = getattr(module, f"{flow}_flow").fn(given)
    assert state.is_failed() and "a run of a deployment takes only such names" in state.message
