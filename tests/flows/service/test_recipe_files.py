"""Which recipes of the folder can run, and why the others cannot."""

import logging
from pathlib import Path
from unittest.mock import Mock

import pytest

from lewis_flows import evaluation_files
from lewis_flows.service.recipe_files import Folder
from tests.flows.service.test_recipe_deployments import GOOD, WORDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one recipe that can run."""
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    return tmp_path


def runnable(seen: Folder) -> list[str]:
    return [each.name for each in seen.files() if not each.why]


def test_whatever_happens_to_a_recipe_counts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = Folder()
    other, local = folder / "other.yaml", folder / "local.yaml"
    assert runnable(seen) == ["good"]
    other.write_text("models: [")  # broken when it is first seen
    assert runnable(seen) == ["good"]
    other.write_text(GOOD)  # mended
    assert runnable(seen) == ["good", "other"]
    other.write_text("models: [")  # broken
    assert runnable(seen) == ["good"]
    other.write_text(GOOD)
    other.rename(folder / "renamed.yaml")
    assert runnable(seen) == ["good", "renamed"]
    (folder / "renamed.yaml").unlink()
    local.write_text(GOOD.replace("org/math", "./model"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert runnable(seen) == runnable(seen) == ["good"]
    assert len(caplog.messages) == 1 and "local cannot run: ./model" in caplog.text
    (folder / "model").mkdir()  # no file of the folder's top has changed
    assert runnable(seen) == ["good", "local"]


def test_a_recipe_counts_again_once_the_config_that_it_names_is_mended(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No file of the folder's top changed, so it stayed paused though `lewis status` found nothing wrong."""
    seen, config = Folder(), folder / "eval" / "lm.yaml"
    config.parent.mkdir()
    config.write_text("tasks: [x]\nlimmit: 3\n")
    (folder / "good.yaml").write_text(f"{GOOD[:-1]}, evaluate: eval/lm.yaml}}")
    assert runnable(seen) == runnable(seen) == []
    assert caplog.text.count("recipe good is left out") == 1
    config.write_text("tasks: [x]\nlimit: 3\n")
    assert runnable(seen) == ["good"]


@pytest.mark.parametrize("wrong", ["config", "task", "function", "data"])
def test_a_recipe_cannot_run_while_a_file_that_it_names_is_wrong(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Each release, and each night, started a run that failed in `check tasks`."""
    files = {
        "config": ("lm.yaml", "tasks: [eval/words/words.yaml]", "evaluate.config: eval/lm.yaml: not valid YAML"),
        "task": ("words/words.yaml", WORDS, "words.yaml: not a readable lm-eval task"),
        "function": ("words/more.py", "", "!function more.rows: no file"),
        "data": ("words/words.jsonl", "{}", "data file 'eval/words/words.jsonl' is missing or empty"),
    }
    (folder / "eval" / "words").mkdir(parents=True)
    for name, text, _ in files.values():
        (folder / "eval" / name).write_text(text)
    (folder / "good.yaml").write_text(f"{GOOD[:-1]}, evaluate: eval/lm.yaml}}")
    seen, (name, _, why) = Folder(), files[wrong]
    assert runnable(seen) == ["good"]
    with monkeypatch.context() as patch:  # they are read again only if one has changed
        patch.setattr(evaluation_files, "read_task", Mock(side_effect=AssertionError))
        assert runnable(seen) == ["good"]
    kept = (folder / "eval" / name).read_text()
    if wrong in ("config", "task"):
        (folder / "eval" / name).write_text("[")
    else:
        (folder / "eval" / name).unlink()
    (file,) = seen.files()
    assert why in file.why and runnable(seen) == runnable(Folder()) == []
    assert caplog.text.count("good cannot run: ") + caplog.text.count("recipe good is left out: ") == 2, "once for each"
    (folder / "eval" / name).write_text(kept)
    assert runnable(seen) == ["good"]
