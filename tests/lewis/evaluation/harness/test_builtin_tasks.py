"""lm-eval's own tasks: the kept index is that of the files that are there; an evaluation gets all files it needs."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lewis import store
from lewis.evaluation.harness import builtin_tasks
from lewis.evaluation.harness.builtin_tasks import Builtin
from lewis.evaluation.harness.lm_eval import EvalSettings, evaluate
from tests.conftest import Family
from tests.support.local_hub import LocalHub

FILES: dict[str, dict[str, Any]] = {
    "sums": {"task": "sums", "dataset_path": "json", "tag": "easy"},
    "words": {"task": "words", "dataset_path": "json"},
    "inner": {"group": "inner", "task": ["words"]},
    "both": {"group": "both", "task": [{"task": "sums", "num_fewshot": 2}, {"group": "inner", "task": ["words"]}]},
    "nested": {
        "group": "nested",
        "task": [{"group": "own", "task": ["easy", {"task": "inline", "dataset_path": "x"}]}],
    },
}


@pytest.fixture
def read(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A package `lm_eval` with `FILES`, and a number for each time that lm-eval has read them all."""
    from lm_eval import tasks
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "package" / "tasks"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    spec = SimpleNamespace(submodule_search_locations=[str(folder.parent)])
    monkeypatch.setattr(builtin_tasks, "find_spec", lambda name: spec)
    times: list[int] = []

    def manager() -> TaskManager:
        times.append(len(times))
        return TaskManager(include_path=str(folder), include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", manager)
    home.mkdir()
    builtin_tasks.index.cache_clear()
    yield times
    builtin_tasks.index.cache_clear()


def names(asked: str) -> list[str]:
    return [path.stem for path in builtin_tasks.files([asked])]


def again() -> list[str]:
    """The index, as the next process has it."""
    builtin_tasks.index.cache_clear()
    return sorted(builtin_tasks.index())


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("words", ["words"]),
        ("easy", ["sums"]),
        ("both", ["both", "sums", "words", "inner"]),
        ("nested", ["nested", "sums"]),
        ("absent", []),
    ],
)
def test_files_are_those_of_all_that_is_in_a_group(asked: str, expected: list[str], read: list[int]) -> None:
    assert sorted(names(asked)) == sorted(expected)


def test_what_was_read_is_kept_until_a_file_changes(read: list[int], tmp_path: Path) -> None:
    first = again()
    assert first == sorted([*FILES, "easy"]) and again() == first and read == [0]
    (tmp_path / "package" / "tasks" / "new.yaml").write_text("task: new\ndataset_path: json\n")
    assert again() == sorted([*first, "new"]) and again() and read == [0, 1]


def test_an_included_file_is_read_once_and_each_task_gets_its_own_copy(read: list[int], tmp_path: Path) -> None:
    from lewis import private_names

    folder = tmp_path / "package" / "tasks"
    (folder / "common").write_text("tag: letters\ndataset_path: json\ntask_list: []\n")
    for name in ("a", "b"):
        (folder / f"{name}.yaml").write_text(f"include: common\ntask: {name}\n")
    row, loads = private_names.LM_EVAL_LOAD, list[str]()
    load = row.get()
    with row.replaced(lambda path, **how: loads.append(Path(path).name) or load(path, **how)):
        assert set(again()) == {*FILES, "easy", "letters", "a", "b"}
    assert loads == ["common"] and builtin_tasks.index()["letters"].tags == ["a", "b"] and row.get() is load


@pytest.mark.parametrize("damage", ["cut", "a name", "a number", "a list"])
def test_what_was_kept_and_is_damaged_is_read_again(damage: str, read: list[int]) -> None:
    first, kept = again(), store.home() / "lm-eval-tasks.json"
    text = kept.read_text()
    damaged = {"cut": text[:-9], "a name": text.replace('"sums"', '"suns"'), "a number": "1", "a list": "[]"}
    kept.write_text(damaged[damage])
    assert again() == first and read == [0, 1] and json.loads(kept.read_text()) == json.loads(text)


def test_without_a_store_nothing_is_written(read: list[int], home: Path) -> None:
    home.rmdir()
    assert again() and not home.exists()


@pytest.mark.slow
def test_one_is_scored_with_its_file_alone(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "sciq" / "sciq.yaml"
    monkeypatch.setattr(builtin_tasks, "index", lambda: {"sciq": Builtin("TASK", str(path), ())})
    keys = ("support", "question", "correct_answer", "distractor1", "distractor2", "distractor3")
    rows = "".join(json.dumps({key: f"w{n + i}" for i, key in enumerate(keys)}) + "\n" for n in range(4))
    files = {f"{split}.jsonl": rows for split in ("train", "validation", "test")}
    with LocalHub(tmp_path / "server") as hub:
        commit = hub.commit("allenai/sciq", files, repo_type="dataset")
        for name, value in hub.environment(tmp_path / "caches").items():
            monkeypatch.setenv(name, value)
        found = evaluate(family.base, EvalSettings(("sciq",), tmp_path))
    assert [(score.task, score.metric) for score in found.scores] == [("sciq", "acc,none"), ("sciq", "acc_norm,none")]
    source = {"path": "allenai/sciq", "config_name": None, "split": "test", "revision": commit}
    assert found.content["sources"] == {"sciq": source}
