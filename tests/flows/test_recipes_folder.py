"""Where the recipes are: a folder that is named, that of a checkout, or one in the store, made at first use."""

from pathlib import Path

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
