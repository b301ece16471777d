"""A task file is accepted exactly if lm-eval scores a small file by it: real task files, changed at random."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, event, given
from hypothesis import strategies as st

from lewis.errors import InputError
from lewis.evaluation.harness.check import check_tasks
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.task_files import reads_hub
from lewis.rehearsal.untrusted import no_package_list, sandboxed_templates
from tests.faults.fuzz import ODD, changed, fuzzed
from tests.support.rehearsing import ask_all

WORDS = "the cat and a dog ran on the red road"
ENDS = ["ran on", "sat down", "is red", "sky"]
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "arc/arc_easy": lambda n: {
        **{"question": f"who {n} ?", "answerKey": "ABC"[n % 3]},
        "choices": {"text": ["cat", "dog", f"mat {n}"], "label": ["A", "B", "C"]},
    },
    "gsm8k/gsm8k": lambda n: {"question": f"what is {n} + 1", "answer": f"it is {n + 1}\n#### {n + 1}"},
    "lambada/lambada_openai": lambda n: {"text": f"{WORDS} {n}"},
    "wikitext/wikitext": lambda n: {"page": f"{WORDS} {n}"},
    "winogrande/default": lambda n: {
        **{"sentence": f"the _ ran on road {n}", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)}
    },
    "hellaswag/hellaswag": lambda n: {
        **{"activity_label": "Run", "ctx_a": WORDS, "ctx_b": f"they {n}", "endings": ENDS, "label": str(n % 4)}
    },
    "nq_open/nq_open": lambda n: {"question": f"where is {n}", "answer": ["here", f"there {n}"]},
    "glue/cola/default": lambda n: {"sentence": f"{WORDS} {n}", "label": n % 2},
}
GROUP: dict[str, Any] = {
    **{"group": "several", "task": ["own", {"task": "second", "num_fewshot": 1}], "num_fewshot": 2},
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
}
FREE = ("task", "group", "class", "dataset_path", "dataset_kwargs", "dataset_name", "use_prompt", "include")
"""Keys about files, code and other machines, whose rules are the product's own."""


class Function(str):
    """The name of a function of a task file."""


class Loader(yaml.SafeLoader):
    """Reads task files."""


class Dumper(yaml.SafeDumper):
    """Writes them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Loader.add_constructor("!function", lambda loader, node: Function(node.value))
Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def builtin(name: str) -> dict[str, Any]:
    from lm_eval import tasks

    text = (Path(tasks.__file__).parent / f"{name}.yaml").read_text()
    found: dict[str, Any] = yaml.load(text, Loader=Loader)
    found |= {"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"rows": "rows.jsonl"}}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if found.get(key) is not None:
            found[key] = "rows"
    found.pop("dataset_name", None)
    return found


def values_in(data: Any) -> Iterator[Any]:
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield value
        yield from values_in(value)


@st.composite
def task_files(draw: st.DrawFn) -> tuple[str, dict[str, dict[str, Any]]]:
    """The rows' name, and name -> content of the YAML files; `own.yaml` or `several.yaml` is asked for."""
    name = draw(st.sampled_from(list(ROWS)))
    own = builtin(name)
    neighbours = [value for each in ROWS for value in values_in(builtin(each))]
    new = st.one_of(ODD, st.sampled_from(neighbours), st.sampled_from(list(own)))
    free = {key: value for key, value in own.items() if key in FREE}
    part = draw(changed({key: value for key, value in own.items() if key not in FREE}, new))
    assume(isinstance(part, dict))
    own = {**part, **free}
    files = {"own": own}
    if draw(st.integers(0, 3)) == 0:  # half of it is included
        keys = [key for key in part if isinstance(key, str)]
        common = {key: own.pop(key) for key in draw(st.lists(st.sampled_from(keys), unique=True))} if keys else {}
        files |= {"own": {**own, "include": "common.yaml"}, "common": common}
    if draw(st.integers(0, 3)) == 0:
        inner = {key: value for key, value in GROUP.items() if key not in FREE}
        files["several"] = {**draw(st.just(inner) | changed(inner, new)), **{k: GROUP[k] for k in ("group", "task")}}
        files["second"] = {**builtin("arc/arc_easy"), **builtin(name), "task": "second"}
        if draw(st.booleans()):
            files["own"]["tag"] = files["second"]["tag"] = "both"
            files["several"]["task"] = ["both"]
    return name, files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's model: a random Llama over bytes, which ends every answer after a few tokens."""
    from lewis.rehearsal.one_word import one_word_model

    lm = one_word_model()
    with torch.no_grad():
        lm.model.lm_head.weight += 0.1 * torch.randn(lm.model.lm_head.weight.shape, generator=torch.manual_seed(3))
    return lm


def scored(model: Any, folder: Path, name: str) -> str:
    """Score a task by all its rows, as lm-eval's command does; return why there is no score, or an empty text."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    said = list[str]()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lm_eval").addHandler(handler)
    try:
        with contextlib.chdir(folder), sandboxed_templates(), no_package_list():
            manager: Any = TaskManager(include_path=str(folder), include_defaults=False)
            loaded = manager.load([name])
            manager.load = lambda _: loaded
            options = {"log_samples": True, "bootstrap_iters": 0, "confirm_run_unsafe_code": True}
            found: Any = simple_evaluate(model=model, tasks=[name], task_manager=manager, **options)
            for task_name, task in loaded["tasks"].items():
                numbers = [v for k, v in found["results"][task_name].items() if "," in k and isinstance(v, int | float)]
                if not numbers:
                    return "no score"
                chooses = task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results)
                if chooses and not any(is_right(task, row) for row in found["samples"][task_name]):
                    return "no target is a choice"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("lm_eval").removeHandler(handler)
    return said[0] if said else ""


def is_right(task: Any, row: dict[str, Any]) -> bool:
    """Whether one of the choices is what lm-eval takes as the answer to a document."""
    choices = task.doc_to_choice(row["doc"])
    target = task.doc_to_text(row["doc"]) if task.multiple_input else row["target"]
    if isinstance(target, list):
        return any(each in range(len(choices)) for each in target)
    return target in range(len(choices)) if isinstance(target, int) else target in choices


def lasts(files: dict[str, dict[str, Any]]) -> bool:
    """Whether what a file asks for takes no more than a moment, and fits any model."""
    numbers = [v for each in files.values() for v in values_in(each) if isinstance(v, int | float) and v == v]
    return all(abs(number) < 100 or abs(number) > 2**40 for number in numbers)


@pytest.mark.usefixtures("home")
@fuzzed
@given(drawn=task_files())
def test_a_task_file_is_accepted_exactly_if_lm_eval_scores_by_it(
    drawn: tuple[str, dict[str, dict[str, Any]]], model: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, files = drawn
    assume(lasts(files))
    differs, text = difference(name, files, model, tmp_path_factory.mktemp("recipe"))
    event(text.partition(":")[0])
    assert not differs, text


def difference(name: str, files: dict[str, dict[str, Any]], model: Any, folder: Path) -> tuple[bool, str]:
    from lm_eval import tasks

    for source in (Path(tasks.__file__).parent / name).parent.glob("*.py"):
        shutil.copy(source, folder)
    for each, content in files.items():
        (folder / f"{each}.yaml").write_text(yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True))
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROWS[name](n)) + "\n" for n in range(8)))
    asked = "several" if "several" in files else "own"
    settings = EvalSettings((asked,), folder, allow_code_execution=True)
    try:
        if reads_hub(settings.found(), folder):
            return False, "elsewhere"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lewis.rehearsal.child.ask_all", partial(ask_all, blames=False))  # blame takes a second
            check_tasks(settings)
        ours = ""
    except InputError as error:
        ours = str(error)
    theirs = scored(model, folder, asked)
    text = f"both accept: {name}" if not ours and not theirs else f"both refuse: {ours}\n{theirs}"
    if bool(ours) != bool(theirs):
        text = f"ours: {ours or 'accepts'}\nlm-eval: {theirs or 'accepts'}\n" + "\n---\n".join(
            path.read_text() for path in sorted(folder.glob("*.yaml"))
        )
    shutil.rmtree(folder)
    return bool(ours) != bool(theirs), text


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", ROWS)
def test_the_files_that_are_changed_are_accepted(
    name: str, model: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    group = {"several": GROUP, "second": {**builtin(name), "task": "second"}} if name.startswith("arc") else {}
    differs, text = difference(name, {"own": builtin(name), **group}, model, tmp_path_factory.mktemp("recipe"))
    assert not differs and text.startswith("both accept"), text
