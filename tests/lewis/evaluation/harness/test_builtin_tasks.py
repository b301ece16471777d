"""lm-eval's own tasks: its index is asked for once; an evaluation gets all files it needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis import store
from lewis.errors import InputError
from lewis.evaluation.harness import builtin_tasks
from lewis.evaluation.harness.builtin_tasks import Builtin
from lewis.evaluation.harness.check import check_tasks
from lewis.evaluation.harness.lm_eval import EvalSettings, evaluate
from lewis.rehearsal.lm_eval_itself import INDEX
from lewis.store import kinds
from tests.conftest import Family
from tests.support.local_hub import LocalHub

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "sums": ("TASK", {"task": "sums", "dataset_path": "json", "tag": "easy"}),
    "words": ("TASK", {"task": "words", "dataset_path": "json"}),
    "inner": ("GROUP", {"group": "inner", "task": ["words"]}),
    "both": (
        "GROUP",
        {"group": "both", "task": [{"task": "sums", "num_fewshot": 2}, {"group": "inner", "task": ["words"]}]},
    ),
    "nested": (
        "GROUP",
        {"group": "nested", "task": [{"group": "own", "task": ["easy", {"task": "inline", "dataset_path": "x"}]}]},
    ),
}


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("words", ["words"]),
        ("easy", ["sums"]),
        ("both", ["both", "inner", "sums", "words"]),
        ("nested", ["nested", "sums"]),
        ("absent", []),
    ],
)
def test_files_are_those_of_all_that_is_in_a_group(
    asked: str, expected: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (_, content) in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    answer = {name: [kind, f"{name}.yaml", []] for name, (kind, _) in FILES.items()} | {"easy": ["TAG", "", ["sums"]]}
    store.write_entry(kinds.REHEARSALS.path(INDEX.key), {"question": INDEX.name, "answer": answer})
    monkeypatch.setattr(builtin_tasks, "package", lambda: tmp_path)
    monkeypatch.setattr(builtin_tasks, "index", builtin_tasks.index.__wrapped__)
    assert sorted(builtin_tasks.files([asked])) == [f"{name}.yaml" for name in expected]


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval_tasks", "asked_here")
def test_unknown_and_unsafe_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'gsm8kk', which is neither; did you mean .*gsm8k"):
        check_tasks(EvalSettings(("gsm8kk",), tmp_path))
    with pytest.raises(InputError, match="humaneval of lm-eval runs code that the model writes"):
        check_tasks(EvalSettings(("humaneval",), tmp_path, allow_code_execution=True))
    check_tasks(EvalSettings(("gsm8k", "mmlu"), tmp_path, num_fewshot=5))


@pytest.mark.slow
def test_one_is_scored_with_its_file_alone(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_tasks, "index", lambda: {"sciq": Builtin("TASK", "tasks/sciq/sciq.yaml", [])})
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
