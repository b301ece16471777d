"""What the READMEs promise: links that lead somewhere, commands that there are, a recipe and a program that run."""

import re
from pathlib import Path

import pytest
import yaml

from lewis.recipe import Recipe
from lewis_flows.cli.main import COMMANDS
from tests.conftest import Family

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("README.md", ".github/*.md", "lewis/**/*.md", "deployments/*.md", "tests/benchmarks/*.md")
    for page in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page.parent / file).resolve() if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_is_one(page: Path) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"^ {4}(?:\.venv/bin/)?lewis (\w+)", text, re.MULTILINE) + re.findall(r"`lewis (\w+)", text)
    assert set(named) - {"COMMAND"} <= {command.name for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_and_module_is_there(page: Path) -> None:
    text = (ROOT / page).read_text()
    folders = "tests|lewis|flows|deployments|tasks/lewis_tasks"
    files = re.findall(rf"(?<![\w./])(?:{folders})/[\w/.-]+\.(?:py|yaml|md)\b", text)
    modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (tests[\w.]+)", text)]
    assert [name for name in [*files, *modules] if not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 220


def test_its_recipe_is_valid_with_its_search(tmp_path: Path) -> None:
    recipe, search = (yaml.safe_load(block) for block in blocks("yaml"))
    found = Recipe.parse(yaml.safe_dump({**recipe, **search}), root=tmp_path)
    assert found.lewis is not None and found.search is not None and found.register_as is not None


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("method", ["regmean_forward", "ties"])
def test_its_program_merges(method: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(expert)} for expert in family.experts],
        "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    [program] = [block for block in blocks("python") if "import lewis" in block]
    exec(compile(program, "README.md", "exec"), {})
    assert (tmp_path / "merged" / "model.safetensors").is_file()
