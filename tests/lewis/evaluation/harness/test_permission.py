"""Code in a task file needs the recipe's permission; templates run in Jinja's sandbox."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.exceptions import SecurityError

from lewis.errors import InputError
from lewis.evaluation.harness import permission
from lewis.evaluation.harness.check import check_tasks
from lewis.evaluation.harness.lm_eval import EvalSettings, evaluate
from lewis.evaluation.harness.permission import check_code
from lewis.evaluation.harness.task_files import find_tasks, reads_hub
from lewis.rehearsal.untrusted import sandboxed_templates
from lewis.walls import isolation

pytestmark = pytest.mark.usefixtures("asked_here")
TASK = {
    **{"task": "own", "dataset_path": "org/pets", "test_split": "test", "output_type": "generate_until"},
    **{"doc_to_text": "{{q}}", "doc_to_target": "{{a}}"},
}


def write(folder: Path, change: dict[str, Any], more: str = "") -> None:
    (folder / "own.yaml").write_text(yaml.safe_dump({**TASK, **change}) + more)


def check(folder: Path, allowed: bool) -> None:
    [(name, task)] = find_tasks(["own.yaml"], folder).files.items()
    check_code(name, task, allowed)


@pytest.mark.parametrize(
    ("change", "more", "what"),
    [
        ({}, "process_docs: !function own.docs\n", "!function own.docs"),
        ({}, "doc_to_choice: !function os.system\n", "!function os.system"),
        ({}, "metric_list: [{metric: !function own.score, aggregation: mean}]\n", "!function own.score"),
        ({}, "class: !function own.Task\n", "!function own.Task"),
        ({"include": "shared.yaml"}, "", "!function own.docs"),
        ({"metric_list": [{"metric": "./evil.py"}]}, "", "a script of the `evaluate` library"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "", "a script of the `evaluate` library"),
        ({"dataset_path": "./evil.py"}, "", r"dataset_path: \./evil\.py"),
        ({"dataset_path": "sql", "dataset_kwargs": {"con": "sqlite:///x", "sql": "x"}}, "", "dataset_path: sql"),
        ({"generation_kwargs": {"custom_generate": "./evil"}}, "", "generation_kwargs: custom_generate"),
        ({"use_prompt": "x.yaml:y"}, "", "use_prompt"),
        ({"group": "all", "task": [{**TASK, "task": "in", "unsafe_code": True}]}, "", "unsafe_code"),
        ({"group": "all", "task": [{**TASK, "task": "in", "metric_list": [{"metric": "x/y"}]}]}, "", "x/y"),
    ],
)
def test_code_needs_the_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], more: str, what: str
) -> None:
    monkeypatch.setattr(permission.sandbox, "check", lambda: None)
    (tmp_path / "own.py").write_text("raise SystemExit('this file must not run')")
    (tmp_path / "shared.yaml").write_text("process_docs: !function own.docs\n")
    (tmp_path / "x.yaml").write_text("prompts: {y: {doc_to_text: '{{q}}'}}\n")
    write(tmp_path, change, more)
    with pytest.raises(InputError, match=rf"evaluate\.tasks: \w+ runs .*{what}.*`allow_code_execution: true`"):
        check(tmp_path, False)
    check(tmp_path, True)


def test_code_may_need_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text("def docs(rows):\n    return rows\n")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(isolation, "_possible", lambda: False)
    write(tmp_path, {}, "process_docs: !function own.docs\n")
    coded = EvalSettings(("own.yaml",), tmp_path, allow_code_execution=True)
    check_tasks(coded)
    monkeypatch.setenv("LEWIS_CODE_NEEDS_NAMESPACES", "1")
    for refused in (lambda: check_tasks(coded), lambda: evaluate(tmp_path, coded)):
        with pytest.raises(InputError, match=r"that allows namespaces.*LEWIS_CODE_NEEDS_NAMESPACES=1"):
            refused()
    write(tmp_path, {})
    check_tasks(coded)
    remote = replace(coded, model_args={"trust_remote_code": True})
    for refused in (lambda: check_tasks(remote), lambda: evaluate(tmp_path, remote)):
        with pytest.raises(InputError, match="expected a machine that allows namespaces"):
            refused()
    monkeypatch.setattr(isolation, "_possible", lambda: True)
    check_tasks(remote)
    write(tmp_path, {}, "process_docs: !function own.docs\n")
    check_tasks(coded)


def test_a_task_without_code_needs_none(tmp_path: Path) -> None:
    metrics = [{"metric": name} for name in ("bleu", "exact_match")]
    write(tmp_path, {"metric_list": metrics, "generation_kwargs": {"until": ["\n"], "do_sample": False}})
    check(tmp_path, False)


def test_templates_render_plain_data_and_nothing_else(tmp_path: Path) -> None:
    with sandboxed_templates():
        render_and_try(tmp_path)


def render_and_try(tmp_path: Path) -> None:
    from lm_eval import utils

    class Picture:
        size = 7

        def save(self, path: str) -> None:
            Path(path).touch()

    doc = {"q": " the  cat ", "options": ["a", "b"], "row": {"text": "x"}, "picture": Picture()}
    usual = (
        "{{q.strip()|regex_replace(' +', ' ')}} {% for o in options %}{{loop.index}}{{o.upper()}}{% endfor %}"
        "{% set n = namespace(i=1) %}{{n.i}}{{row.text}}{{row['text']}}{{', '.join(options)}}{{'%s' % q|length}}\n"
    )
    assert utils.apply_template(usual, doc) == "the cat 1A2B1xxa, b10\n"
    other = {**doc, "q": "the dog sits"}
    assert utils.apply_template(usual, other) == "the dog sits 1A2B1xxa, b12\n"
    assert utils.env.from_string(usual) is utils.env.from_string(usual)  # compiled once
    mark = tmp_path / "mark"
    for template in (
        f"{{{{ cycler.__init__.__globals__.os.popen('touch {mark}').read() }}}}",
        f"{{{{ (q|attr('__class__')).mro()[1].__subclasses__() }}}}{mark}",
        "{{ '{0.__class__.__init__.__globals__}'.format(q) }}",
        f"{{{{ picture.save('{mark}') }}}}",
        "{{ lipsum.__globals__ }}",
    ):
        with pytest.raises(SecurityError):
            utils.apply_template(template, doc)
    assert not mark.exists()


def test_the_environment_of_an_evaluation_has_what_libraries_need_and_no_secrets() -> None:
    harmless = {"PATH": "/bin", "HOME": "/root", "HF_HOME": "/hf", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING", "X_KEY")
    secrets = {**dict.fromkeys((*names, "LEWIS_WEBHOOK_SECRET"), "s"), "HTTPS_PROXY": "http://u:s@h"}
    secrets |= {"MLFLOW_TRACKING_URI": "http://u:s@h"}
    assert isolation.without_secrets({**harmless, **secrets}) == {**harmless, **isolation.FIXED}
    assert isolation.way_to_the_hub(secrets) == {"HTTPS_PROXY": "http://u:s@h"}


def test_what_reads_from_another_machine(tmp_path: Path) -> None:
    write(tmp_path, {"dataset_path": "json", "dataset_kwargs": {"data_files": "rows.jsonl"}})
    assert not reads_hub(find_tasks(("own.yaml",), tmp_path), tmp_path)
    write(tmp_path, {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "https://host/rows.jsonl"}}})
    assert reads_hub(find_tasks(("own.yaml",), tmp_path), tmp_path)
    write(tmp_path, {"dataset_path": "json", "dataset_kwargs": {"data_files": "rows.jsonl"}})
    assert reads_hub(find_tasks(("own.yaml", "gsm8k"), tmp_path), tmp_path)
    write(tmp_path, {})
    assert reads_hub(find_tasks(("own.yaml",), tmp_path), tmp_path)
    (tmp_path / "org/pets").mkdir(parents=True)
    assert not reads_hub(find_tasks(("own.yaml",), tmp_path), tmp_path)
