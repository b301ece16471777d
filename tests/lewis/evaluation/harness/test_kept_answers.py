"""A killed evaluation goes on where it was: nothing finished is computed again, and the scores are the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lewis.errors import LewisError
from lewis.evaluation import step
from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.kept_answers import KeptAnswers
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scores import places_of
from lewis.models.source import ModelFiles
from lewis.store import kinds, sealed_json
from tests.conftest import Family
from tests.support.completions_server import serving
from tests.support.killed_evaluation import asked, killed_at, lines

pytestmark = pytest.mark.slow

KILLS = 2
DOCUMENTS, BATCH = 80, 4
COMMON = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "doc_to_text": "q",
}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_target": "n", "doc_to_choice": ["w1 w2", "w3", "w4"]},
    "answers": {"output_type": "loglikelihood", "doc_to_target": "a", "metric_list": [PERPLEXITY]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}} {{a}}"},
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "a",
        "generation_kwargs": {"until": ["w9"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder with four tasks on rows of several lengths, some of them equal."""
    monkeypatch.setattr(lm_eval, "reads_hub", lambda found, root: True)  # so that all share a fork server
    folder = tmp_path / "recipe"
    folder.mkdir()
    rows = [
        {"q": " ".join(f"w{n * k % 11}" for k in range(1, 3 + n % 7)), "a": f"w{n % 5} w{n % 3}", "n": n % 3}
        for n in range(DOCUMENTS // 2)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows * 2))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **COMMON, **task}))
    return folder


def test_a_killed_evaluation_goes_on_with_the_same_batches_to_the_same_bytes(
    root: Path, family: Family, tmp_path: Path
) -> None:
    settings = EvalSettings(tuple(TASKS), root, batch_size=BATCH)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    undisturbed = lm_eval.evaluate(family.math, settings, answers=whole)
    batches = lines(whole)
    kept = sum(len(sealed_json.unsealed(json.loads(line))["answers"]) for line in batches)
    in_windows = DOCUMENTS // BATCH  # a batch of windows is one answer
    of_guards = 64 // 3 + 1  # reference answers of `written`, whose perplexity is measured; generations
    assert kept == DOCUMENTS * (3 + 1 + 1) + in_windows + of_guards
    assert lm_eval.evaluate(family.math, settings).content == undisturbed.content  # keeping changes nothing

    points = [len(batches) * (n + 1) // (KILLS + 1) for n in range(KILLS)]
    for point in points:
        with killed_at(path, root, point), pytest.raises(LewisError, match="killed by SIGKILL"):
            lm_eval.evaluate(family.math, settings, answers=path)
        with path.open("a") as file:
            file.write('{"answers": [["cut')
    assert len(batches) > len(lines(path)) >= points[-1]
    again = lm_eval.evaluate(family.math, settings, answers=path)
    assert again.content == undisturbed.content and json.dumps(again.content) == json.dumps(undisturbed.content)
    # Each batch is there once: what was finished is not computed again, and the rest was cut into the same batches.
    assert sorted(lines(path)) == sorted(batches)
    before = path.read_bytes()
    assert lm_eval.evaluate(family.math, settings, answers=path).content == again.content
    assert path.read_bytes() == before


def test_a_server_is_asked_again_for_one_batch_at_most(
    root: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the server, for several requests at the same time."""
    concurrent, path = 3, tmp_path / "answers.jsonl"
    with serving(family.math) as (url, answers):
        monkeypatch.setenv("LEWIS_EVALUATION_SERVER", url)
        settings = EvalSettings(
            ("choice", "written"),
            root,
            batch_size=BATCH,
            backend="openai",
            model_args={"num_concurrent": concurrent},
            limit=40,
        )
        whole = lm_eval.evaluate(family.math, settings, answers=tmp_path / "whole.jsonl")
        once = asked(answers.asked)
        answers.asked.clear()
        with killed_at(path, root, 17), pytest.raises(LewisError, match="killed by SIGKILL"):
            lm_eval.evaluate(family.math, settings, answers=path)
        again = lm_eval.evaluate(family.math, settings, answers=path)
        assert once <= asked(answers.asked) <= once + concurrent * BATCH
        assert again.content == whole.content


def test_a_step_keeps_answers_until_its_entry_is_written(root: Path, family: Family) -> None:
    files, settings = ModelFiles.at("math", "killed", family.math), EvalSettings(("choice",), root, batch_size=BATCH)
    path = kinds.ANSWERS.path(f"{step.scores_digest('killed', settings.by_task()[0], 'cpu')}-{BATCH}")
    with killed_at(path, root, 3), pytest.raises(LewisError, match="killed by SIGKILL"):
        step.score(files, settings)
    assert path in kinds.ANSWERS.entries() and step.find_scores("math", "killed", settings) is None
    assert step.score(files, settings).scores and path not in kinds.ANSWERS.entries()


class Asynchronous:
    """A model as lm-eval's `vllm` is: it tells the cache of other settings than it was asked for."""

    def __init__(self) -> None:
        self.asked = list[str]()
        self.model = SimpleNamespace(generate=lambda prompts: [prompt.upper() for prompt in prompts])
        self.cache_hook: Any = None

    def set_cache_hook(self, hook: Any) -> None:
        self.cache_hook = hook

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return [(-1.0, True) for _ in requests]

    loglikelihood_rolling = _loglikelihood_tokens = loglikelihood

    def generate_until(self, requests: list[Any]) -> list[str]:
        found = list[str]()
        for start in range(0, len(requests), 2):
            chunk = [request.args for request in requests[start : start + 2]]
            self.asked += [prompt for prompt, _ in chunk]
            written = self.model.generate([prompt for prompt, _ in chunk])
            for (prompt, settings), text in zip(chunk, written, strict=True):
                found.append(f"{text}{settings['n']}")
                self.cache_hook.add_partial("generate_until", (prompt, {**settings, "stop": []}), found[-1])
        return found


def requests(*prompts: str, **settings: Any) -> list[Any]:
    return [SimpleNamespace(args=(prompt, settings)) for prompt in prompts]


def answered(path: Path, ask: Callable[[Any], list[Any]]) -> tuple[list[Any], list[str]]:
    """What is answered, and what the model was asked for."""
    lm = Asynchronous()
    with KeptAnswers(path).used_by(lm):
        found = ask(lm)
    assert lm.cache_hook is None and "generate_until" not in vars(lm)
    return found, lm.asked


def test_equal_prompts_with_other_settings_and_drawn_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    both = [*requests("a", "b", "a", n=1), *requests("a", "c", n=2)]
    first = answered(path, lambda lm: lm.generate_until(both))
    assert first == (["A1", "B1", "A1", "A2", "C2"], ["a", "b", "a", "a", "c"])
    assert answered(path, lambda lm: lm.generate_until(both)) == (first[0], [])
    path.write_text(path.read_text().replace("B1", "X1"))  # its line is damaged: both of the batch are asked for again
    assert answered(path, lambda lm: lm.generate_until(both)) == (first[0], ["b", "a"])
    for drawn in ({"do_sample": True}, {"temperature": 0.7}):
        ask = requests("d", n=1, **drawn)
        for _ in range(2):
            assert answered(path, lambda lm, ask=ask: lm.generate_until(ask)) == (["D1"], ["d"])


@pytest.mark.long
def test_a_larger_look_has_the_documents_of_the_smaller_one_and_asks_for_the_others_only(
    root: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by a server: two looks and all documents ask for as much as all documents."""
    with serving(family.math) as (url, answers):
        monkeypatch.setenv("LEWIS_EVALUATION_SERVER", url)
        settings = EvalSettings(("choice", "written"), root, batch_size=BATCH, backend="openai")
        seen, scores = list[set[tuple[str, int]]](), []
        for key, looks in (("whole", [None]), ("looked", [24, 72, None])):
            answers.asked.clear()
            for look in looks:
                found = step.score(ModelFiles.at("math", key, family.math), replace(settings, look=look))
                places = [set(places_of(part.documents)) for each in found.evaluated.samples for part in each.parts]
                assert {len(each) for each in places} == {look or DOCUMENTS}
                assert found.pools == {"choice": DOCUMENTS, "written": DOCUMENTS}
                assert not seen or key == "whole" or all(map(set.issubset, seen, places))
                seen = [] if key == "whole" else places
                assert len(kinds.ANSWERS.entries()) == (2 if look else 0)  # what is whole needs them no more
            scores.append((asked(answers.asked), found.scores))
    (once, whole), (looked, again) = scores
    of_guards = 2 * (4 + 64)  # generations and answers of other documents
    assert once <= looked <= once + of_guards < once + (24 + 72) * 4
    assert [each.value for each in again] == pytest.approx([each.value for each in whole], rel=1e-5)


def test_documents_by_release_are_drawn_by_the_seed_and_a_look_is_a_part_of_them(root: Path, family: Family) -> None:
    settings = EvalSettings(("choice",), root, limit=20, documents="by_release", seed="a")

    def documents(**changes: Any) -> set[tuple[str, int]]:
        found = step.score(ModelFiles.at("math", "key", family.math), replace(settings, **changes))
        return set(places_of(found.evaluated.samples[0].parts[0].documents))

    first, second, part = documents(), documents(seed="b"), documents(look=10)
    assert len(first) == len(second) == 20 and len(part) == 10 and part < first
    assert first != second and first & second  # 20 of 40 that differ
    [answers] = kinds.ANSWERS.entries()  # of all documents, whichever are drawn
    before = len(lines(answers))
    assert documents(seed="c") and before < len(lines(answers))
    # What an earlier version kept is found: nothing of this is in the digest unless it is used.
    plain = EvalSettings(("choice",), root)
    assert lm_eval.tasks_digest(plain) != lm_eval.tasks_digest(replace(plain, look=10))
    assert replace(settings, look=10).whole == plain
