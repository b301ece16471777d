"""What lm-eval says of a task file: what is wrong with it, by the key and in lm-eval's words, before any work.

`tests/faults/test_fuzz_tasks.py` compares what is accepted with what lm-eval scores; here is what a user reads.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import InputError
from lewis.evaluation.harness.check import check_tasks
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.rehearsed import question, rehearsed
from lewis.rehearsal.answers import known

ROWS = [{"question": f"who ran on road {n} ?", "answer": n % 3, "text": f" the cat {n}"} for n in range(10)]
DATA = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}}, "test_split": "test"}
CHOICE: dict[str, Any] = {
    **{**DATA, "task": "own", "output_type": "multiple_choice"},
    **{"doc_to_text": "question", "doc_to_target": "answer", "doc_to_choice": ["cat", "dog", "red"]},
}
WRITTEN: dict[str, Any] = {
    **{**DATA, "task": "own", "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "text"},
    **{"generation_kwargs": {"until": ["?"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    (folder / "data").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def write(root: Path, config: dict[str, Any], more: str = "", name: str = "own") -> EvalSettings:
    (root / f"tasks/{name}.yaml").write_text(yaml.safe_dump(config) + more)
    return EvalSettings(("own",), root, allow_code_execution=True)


@pytest.mark.usefixtures("asked_here", "lm_eval_tasks")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CHOICE, "doc_to_tex": "x"}, r"doc_to_tex: lm-eval [\d.]+ says \".*argument 'doc_to_tex'\"; accepted w"),
        ({**CHOICE, "test_split": "tset"}, 'test_split: datasets .* says "KeyError: tset"; accepted with "test"'),
        ({**CHOICE, "test_split": None}, 'says "Task dataset .* must have valid or test docs!"'),
        ({**CHOICE, "doc_to_text": "{{query}}"}, "doc_to_text: .* says \"'query' is undefined\"; accepted with \"\""),
        ({**CHOICE, "doc_to_text": "{{q|uper}}"}, "doc_to_text: .* says \"No filter named 'uper'.\"; accepted with"),
        ({**CHOICE, "doc_to_choice": "text"}, "says \"doc_to_choice must return list\""),
        ({**CHOICE, "doc_to_target": "{{answer + 3}}"}, 'doc_to_target: .* says "list index out of range"; accepted'),
        ({**CHOICE, "doc_to_target": "text"}, "no choice counts as right in the first 8 documents.* is ' the cat 0'"),
        ({**CHOICE, "num_fewshot": 11}, 'num_fewshot: .* says "Sample larger than population.*accepted without it'),
        ({**CHOICE, "metric_list": [{"metric": "bleu"}]}, "metric_list: own: lm-eval computes none .* for multiple"),
        ({**CHOICE, "metric_list": []}, "metric_list: .*no score for multiple_choice; accepted without it"),
        ({**CHOICE, "metric_list": [{"metric": "f1", "aggregation": "mean"}]}, "metric_list: .*accepted without it"),
        ({**CHOICE, "output_type": "generate_untill"}, "output_type: .*Got invalid output_type.*accepted without it"),
        ({**CHOICE, "filter_list": [{"name": "x", "filter": [{"function": "majority_vote"}]}]}, "filter_list: .* says"),
        ({**WRITTEN, "filter_list": [{"name": "x", "filter": [{"function": "regex", "regex": "x"}]}]}, "list: .* says"),
        ({**WRITTEN, "generation_kwargs": {"until": ["?"], "temprature": 1}}, r"generation_kwargs\.temprature: .*says"),
        ({**WRITTEN, "generation_kwargs": {"until": 5}}, r"generation_kwargs(\.until)?: .* says"),
        ({**WRITTEN, "metric_list": [{"metric": "acc"}]}, "metric_list: .* says"),
        ({**WRITTEN, "fewshot_config": {"sampler": "first"}}, r"fewshot_config: .*contextsampler 'first'.*without it"),
        ({"group": "own", "task": ["own"]}, "task own: .*recursion|task own: .* says"),
        ({"group": "own", "task": ["inner", "gone"]}, "gone"),
    ],
)  # fmt: skip
def test_a_broken_task_file_is_refused_with_its_key_and_what_lm_eval_says(
    root: Path, config: dict[str, Any], message: str
) -> None:
    write(root, {**CHOICE, "task": "inner"}, name="inner")
    with pytest.raises(InputError, match=message) as error:
        check_tasks(write(root, config))
    assert "Traceback" not in str(error.value)


@pytest.mark.usefixtures("asked_here")
@pytest.mark.parametrize(
    "config",
    [
        {**CHOICE, "doc_to_text": "{% if hint is defined %}{{hint}}{% endif %}{{question}}"},
        {**CHOICE, "num_fewshot": 9, "fewshot_split": "test"},
        {**CHOICE, "fewshot_config": {"samples": ["x"]}},  # which are not asked for
        {**CHOICE, "metric_list": [{"metric": "acc"}, {"metric": "bleu"}]},  # lm-eval leaves it out
        {**CHOICE, "doc_to_choice": {"a": "cat", "b": "dog", "c": "red"}},
        {**WRITTEN, "dataset_kwargs": {"data_files": "data/rows.jsonl"}, "test_split": "train"},
        {**WRITTEN, "repeats": 2, "filter_list": [{"name": "x", "filter": [{"function": "take_first_k", "k": 2}]}]},
        {"group": "own", "task": ["inner", {**CHOICE, "task": "new", "num_fewshot": 2}], "num_fewshot": 1},
    ],
)
def test_what_lm_eval_takes_is_accepted(root: Path, config: dict[str, Any]) -> None:
    write(root, {**CHOICE, "task": "inner"}, name="inner")
    check_tasks(write(root, config))


@pytest.mark.usefixtures("asked_here")
def test_examples_that_the_recipe_asks_for_need_rows_but_not_where_a_task_sets_0(root: Path) -> None:
    def asked(shots: int) -> EvalSettings:
        return EvalSettings(("own",), root, num_fewshot=shots)

    write(root, CHOICE)
    check_tasks(asked(9))
    with pytest.raises(InputError, match=r'evaluate\.num_fewshot: .*"Sample larger than .*accepted without it'):
        check_tasks(asked(11))
    write(root, {**CHOICE, "num_fewshot": 0})
    check_tasks(asked(11))


@pytest.mark.usefixtures("asked_here")
def test_a_tag_of_the_recipes_files_stands_for_the_tasks_that_have_it(root: Path) -> None:
    for name, tag in {"cats": "furry", "dogs": ["furry", "loud"]}.items():
        write(root, {**CHOICE, "task": name, "tag": tag}, name=name)
    group = {"group": "own", "task": ["furry"], "aggregate_metric_list": [{"metric": "acc"}]}
    settings = write(root, group)
    assert set(rehearsed(settings)) == {"own", "cats", "dogs"}
    assert set(rehearsed(EvalSettings(("furry",), root))) == {"cats", "dogs"}


@pytest.mark.usefixtures("asked_here")
def test_an_answer_is_kept_until_a_file_that_decides_it_changes(root: Path) -> None:
    write(root, {"num_fewshot": 0}, name="common")
    (root / "tasks/code.py").write_text("def docs(rows):\n    return rows.select(range(3))\n")
    settings = write(root, {**CHOICE, "include": "common.yaml"}, "process_docs: !function code.docs\n")
    found = rehearsed(settings)
    assert found["own"].documents == 3
    moved = root.rename(root.with_name("moved"))
    settings = EvalSettings(("own",), moved, allow_code_execution=True)
    assert known(question(settings)) is not None
    for file in ("data/rows.jsonl", "tasks/code.py", "tasks/common.yaml", "tasks/own.yaml"):
        before = (moved / file).read_text()
        (moved / file).write_text(before + "\n")
        assert known(question(settings)) is None
        (moved / file).write_text(before)
    assert known(question(EvalSettings(("own",), moved, num_fewshot=1, allow_code_execution=True))) is None


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_code_runs_in_the_child_alone_and_templates_run_none(root: Path, tmp_path: Path) -> None:
    here = tmp_path / "made"
    code = f"{{{{ cycler.__init__.__globals__.os.mkdir('{here}') }}}}"
    with pytest.raises(InputError, match=r"doc_to_text: .*unsafe"):
        check_tasks(write(root, {**CHOICE, "doc_to_text": code}))
    (root / "tasks/code.py").write_text(
        "import os\n\ndef docs(rows):\n    raise ValueError(f\"{os.environ.get('SECRET_TOKEN')} {os.getpid()}\")\n"
    )
    with pytest.raises(InputError, match=r"process_docs: .*None"):
        check_tasks(write(root, CHOICE, "process_docs: !function code.docs\n"))
    (root / "tasks/code.py").write_text("raise SystemExit('no')\n")
    with pytest.raises(InputError, match="task own: lm-eval ends the process that asks"):
        check_tasks(write(root, CHOICE, "process_docs: !function code.docs\n"))
    assert not here.exists()


@pytest.mark.usefixtures("asked_here")
def test_a_large_file_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lewis.evaluation.harness.rehearsed.MOST_DATA", 10)
    settings = write(root, {**CHOICE, "doc_to_text": "{{query}}"})
    assert rehearsed(settings)["own"].documents is None
