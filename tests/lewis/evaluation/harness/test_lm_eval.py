"""Scores from real lm-eval runs of a tiny random model, and the ways in which such a run can end badly."""

import ast
import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import re
import runpy
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jinja2 import Environment

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation import step
from lewis.evaluation.harness import process
from lewis.evaluation.harness.lm_eval import EvalSettings, check_tasks, evaluate, tasks_digest
from lewis.evaluation.harness.process import LM_EVAL
from lewis.evaluation.harness.task_config import check_config
from lewis.evaluation.harness.task_files import TaskFile
from lewis.evaluation.harness.task_metrics import configs_and_scores
from lewis.evaluation.results_folder import read_results
from lewis.evaluation.statistics.scored import WEIGHTED_KEY, Scored
from lewis.evaluation.statistics.scores import Evaluated, Score, read_texts, score_table
from lewis.models.source import ModelFiles
from lewis.store import kinds
from lewis.walls import fork_server, isolation
from tests.conftest import POINTS
from tests.support.canary import CANARY
from tests.support.local_hub import LocalHub

pytestmark = pytest.mark.slow

SECRET = secrets.token_hex(16)  # no other run's files, nor this one's sources, hold it
RECIPES = Path(__file__).parents[4] / "deployments/recipes"
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "road", "red", "blue", "is", "sky", "and", "who", "?"]
CHOICES = [" cat", " dog", " red"]
ROWS = [
    {"question": "the sky is", "answer": 2, "text": " red"},
    {"question": "who sat on the mat ?", "answer": 0, "text": " the cat sat"},
    {"question": "the dog ran and the", "answer": 0, "text": " cat ran"},
    {"question": "who ran on a road ?", "answer": 1, "text": " a red dog and a blue cat"},
    {"question": "a blue road is", "answer": 1, "text": " blue"},
]
DATA = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}}, "test_split": "test"}
CHOICE = {
    **DATA,
    "task": "pets",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "doc_to_choice": [choice.strip() for choice in CHOICES],
}
ANSWERS = {
    **DATA,
    "task": "answers",
    "output_type": "loglikelihood",
    "num_fewshot": 0,
    "doc_to_text": "question",
    "doc_to_target": "text",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
WRITTEN = {
    **DATA,
    "task": "written",
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "said",
    "generation_kwargs": {"until": ["?"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [{"name": "first-word", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}]}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random two-layer Llama, scaled up so that its answers are not all ties."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(7)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), bos_token_id=1, eos_token_id=2, **shape))
    for parameter in llama.parameters():
        parameter.data.mul_(20) if parameter.dim() == 2 else None
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A recipe's folder with its data and the three tasks."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    folder = tmp_path / "recipe"
    (folder / "data").mkdir(parents=True)
    (folder / "tasks").mkdir()
    write_rows(folder, ["-"] * len(ROWS))
    for config in (CHOICE, ANSWERS, WRITTEN):
        write_task(folder / f"tasks/{config['task']}.yaml", config)
    return folder


def write_rows(folder: Path, said: list[str]) -> None:
    rows = [{**row, "said": word} for row, word in zip(ROWS, said, strict=True)]
    (folder / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(path: Path, config: dict, function: str = "") -> None:
    path.write_text(yaml.safe_dump(config) + function)


def load(folder: Path, adapter: Path | None = None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (PeftModel.from_pretrained(llama, adapter) if adapter else llama).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@torch.no_grad()
def loglikelihood(llama, tokenizer, prompt: str, answer: str) -> float:
    """Sum of the log-probabilities of the answer's tokens, in nats."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"]
    logs = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids)))


@torch.no_grad()
def first_word(llama, tokenizer, prompt: str) -> str:
    """The first word of four greedy tokens, up to a question mark."""
    ids = tokenizer(prompt, return_tensors="pt")
    written = llama.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=2)[0, ids["input_ids"].shape[1] :]
    words = re.findall(r"\w+", tokenizer.decode(written, skip_special_tokens=True).split("?")[0])
    return words[0] if words else "[invalid]"


def lm_eval_command(model: Path, root: Path, monkeypatch, *options: str) -> dict:
    """The results that `lm_eval run` writes, in this process, which spares its imports."""
    from lm_eval import tasks
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.chdir(root)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the command sets it
    # The index of all of lm-eval's own tasks would take seconds.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    fixed = ["--model=hf", f"--model_args=pretrained={model},dtype=float32", "--device=cpu", "--batch_size=2"]
    where = ["--include_path=.", f"--output_path={root / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *fixed, *where, *options])
    cli_evaluate()
    (written,) = (root / "out").rglob("results_*.json")
    return json.loads(written.read_text())["results"]


def perplexity(llama, tokenizer) -> float:
    logs = [loglikelihood(llama, tokenizer, row["question"], row["text"]) for row in ROWS]
    return math.exp(-sum(logs) / len(logs))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def hold(lock: Path, own_session: bool = False) -> str:
    """Code that holds a lock until its process and all that it starts with `close_fds=False` have ended."""
    return (
        f"lock = os.open('{lock}.new', os.O_RDWR | os.O_CREAT)\n"
        "os.set_inheritable(lock, True)\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        f"sleeper = subprocess.Popen(['sleep', '600'], close_fds=False, start_new_session={own_session})\n"
        f"os.rename('{lock}.new', '{lock}')\n"
    )


def held(lock: Path) -> bool:
    """Whether one of those processes lives. Their numbers would not tell: they may be in a namespace of their own."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def servers() -> set[int]:
    """The Pythons of fork servers of this process, their keepers and children; other workers of pytest have theirs."""
    found, ours = set(), f"TMPDIR={fork_server._seen(os.getpid())}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            variables = path.with_name("environ").read_bytes().split(b"\0")
            if b"lewis.evaluation.harness.child" in words and words[1] == b"-P" and ours in variables:
                found.add(int(path.parent.name))
    return found


def faulty(root: Path, code: str) -> str:
    """A task at whose documents the child runs this code."""
    head = "import fcntl, os, pathlib, signal, subprocess, sys, time\n\ndef docs(rows):\n"
    (root / "tasks/faulty.py").write_text(head + "".join(f"    {line}\n" for line in code.splitlines()))
    write_task(root / "tasks/faulty.yaml", {**CHOICE, "task": "faulty"}, "process_docs: !function faulty.docs\n")
    return "faulty"


class TestScores:
    def test_every_metric_equals_our_own_computation_and_that_of_the_lm_eval_command(
        self, model, root, caplog, monkeypatch
    ):
        group = {"group": "both", "task": ["pets"], "aggregate_metric_list": [{"metric": "acc"}]}
        write_task(root / "both.yml", group)
        seen = []
        settings = EvalSettings(("both.yml", "tasks/answers.yaml", "written"), root, num_fewshot=1, batch_size=2)
        with caplog.at_level(logging.WARNING, "lewis"):
            evaluated = evaluate(model, settings, progress=lambda *progress: seen.append(progress))
        scores = evaluated.scores
        found = {(score.task, score.metric): score for score in scores}
        llama, tokenizer = load(model)

        assert found["answers", "perplexity,none"].value == pytest.approx(perplexity(llama, tokenizer), rel=1e-4)
        assert found["answers", "perplexity,none"].stderr > 0
        assert found["answers", "perplexity,none"].higher_is_better is False
        assert "answers: evaluate.num_fewshot is 1, the task fixes 0" in caplog.text

        assert set(found) == {
            ("pets", "acc,none"),
            ("pets", "acc_norm,none"),
            ("both", "acc,none"),
            ("answers", "perplexity,none"),
            ("written", "exact_match,first-word"),
        }
        assert found["both", "acc,none"].value == found["pets", "acc,none"].value
        assert {score.samples for score in scores} == {len(ROWS)}
        texts = read_texts(evaluated.content)
        assert {name[0] for name in texts} == {"pets", "written"} and len(texts) == 2 * len(ROWS)
        by_prompt = {name[0]: {} for name in texts}
        for name, each in texts.items():
            by_prompt[name[0]][each.prompt.splitlines()[-1]] = each
        for row in ROWS:
            chosen, wrote = (by_prompt[task][row["question"]] for task in ("pets", "written"))
            assert chosen.target == CHOICES[row["answer"]].strip() and chosen.answer in CHOICE["doc_to_choice"]
            assert wrote.target == "-" and wrote.answer
        right = sum(each.answer == each.target for each in by_prompt["pets"].values())
        assert right / len(ROWS) == found["pets", "acc,none"].value
        assert found["written", "exact_match,first-word"].higher_is_better is True
        for kind in ("loglikelihood requests", "generate_until requests"):
            done, totals = zip(*(numbers for what, *numbers in seen if what == kind), strict=True)
            assert list(done) == sorted(set(done)) and {done[-1]} == set(totals)

        plain = lm_eval_command(model, root, monkeypatch, "--tasks=pets,answers,written", "--num_fewshot=1")
        del found["both", "acc,none"]  # which the command does not find in a .yml
        for (task, metric), score in found.items():
            assert score.value == plain[task][metric]
            if metric != "perplexity,none":  # whose standard error is resampled
                assert score.stderr == plain[task][metric.replace(",", "_stderr,")]

    def test_tasks_that_are_scored_alone_are_joined_as_if_scored_in_one_call(self, model, root):
        """A group, a task of its own folder, and one that is looked up by its name there; every metric and sample."""
        (root / "tasks/answers.yaml").rename(root / "answers.yaml")
        group = {"group": "both", "task": ["pets", "written"], "aggregate_metric_list": [{"metric": "acc"}]}
        write_task(root / "both.yml", group)
        settings = EvalSettings(("both.yml", "answers.yaml", "mats"), root)
        write_task(root / "tasks/mats.yaml", {**CHOICE, "task": "mats", "doc_to_text": "on a mat {{question}}"})
        files = ModelFiles.at("math", "key", model)
        made = step.score(files, settings)
        assert [entry.digest for entry in made.entries] == [
            step.scores_digest("key", replace(settings, tasks=(task,)), "cpu") for task in settings.tasks
        ]
        found, whole = made.evaluated, evaluate(model, settings)
        assert [each.key for each in found.scores] == [each.key for each in whole.scores]
        assert [each.key for each in found.samples] == [each.key for each in whole.samples]
        for ours, theirs in zip(found.scores, whole.scores, strict=True):
            if ours.metric != "perplexity,none":  # whose standard error is resampled
                assert (ours.stderr, ours.higher_is_better) == (theirs.stderr, theirs.higher_is_better)
            assert ours.value == pytest.approx(theirs.value, rel=1e-6) and ours.samples == theirs.samples
        for ours, theirs in zip(found.samples, whole.samples, strict=True):
            assert [part.documents for part in ours.parts] == [part.documents for part in theirs.parts]
            for mine, other in zip(ours.parts, theirs.parts, strict=True):
                assert (mine.weight, mine.aggregation) == (other.weight, other.aggregation)
                assert list(mine.sums().flat) == pytest.approx(list(other.sums().flat), rel=1e-6)
        weights = {"both": 1.0, "mats": 3.0}
        mine_scored = Scored.of("math", "key", found, weights)
        theirs_scored = Scored.of("math", "key", whole, weights)
        mine, theirs = (each.by_name[WEIGHTED_KEY] for each in (mine_scored, theirs_scored))
        assert mine == theirs and found.ends.empty == whole.ends.empty
        assert (found.ends.tried, whole.ends.tried) == (4 * 3, 4)

        assert read_texts(found.content).keys() == read_texts(whole.content).keys()
        for entry in made.entries:  # an older version kept no texts
            content = dict(store.read_entry(entry.path))
            assert content.pop("texts") or "answers" in content["results"]
            store.write_entry(entry.path, content)
        old = step.find_scores("math", "key", settings)
        assert old == made and Scored.of("math", "key", old.evaluated, weights) == mine_scored
        assert mine_scored.texts and not Scored.of("math", "key", old.evaluated).texts

        # A task more costs that task alone, and one that goes costs nothing.
        more = replace(settings, tasks=("pets", *settings.tasks[1:]))
        before = {path: path.read_bytes() for path in kinds.SCORES.entries()}
        assert step.find_scores("math", "key", more) is None
        assert step.score(files, more).entries[1:] == made.entries[1:]
        assert len(kinds.SCORES.entries()) == 4 and all(path.read_bytes() == data for path, data in before.items())

    def test_choices_generation_and_an_adapter(self, model, root, tmp_path):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        llama, tokenizer = load(model)
        tuned = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        tuned.save_pretrained(tmp_path / "adapter")

        tuned, base = load(model, tmp_path / "adapter")[0], load(model)[0]
        words = [first_word(tuned, tokenizer, row["question"]) for row in ROWS]
        write_rows(root, [*words[:3], "-", "-"])

        scores = evaluate(
            model, EvalSettings(("pets", "answers", "written"), root), adapter=tmp_path / "adapter"
        ).scores

        found = {score.metric: score for score in scores}
        assert found["perplexity,none"].value == pytest.approx(perplexity(tuned, tokenizer), rel=1e-4)
        assert abs(perplexity(tuned, tokenizer) / perplexity(base, tokenizer) - 1) > 1e-2
        right = []
        for row in ROWS:
            logs = [loglikelihood(tuned, tokenizer, row["question"], choice) for choice in CHOICES]
            right.append(logs.index(max(logs)) == row["answer"])
        accuracy = sum(right) / len(right)
        assert found["acc,none"].value == pytest.approx(accuracy)
        assert found["exact_match,first-word"].value == pytest.approx(0.6)
        assert found["acc,none"].stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(ROWS) - 1)))

    @pytest.mark.long
    def test_the_reference_answers_of_the_recipes(self, model, root):
        """The tasks that deployments/recipes ships: bits per byte of the answer, averaged over the documents."""
        shutil.copytree(RECIPES / "tasks", root / "shipped")
        gsm8k = [
            {"question": "who sat ?", "answer": "the cat <<1+1=2>>sat\nred"},
            {"question": "is", "answer": "a dog"},
        ]
        mbpp = [{"text": "the mat", "test_list": ["red is blue", "-"], "code": "dog\r\ncat"}]
        for name, rows in {"gsm8k": gsm8k, "mbpp": mbpp}.items():
            (root / "data" / name).mkdir()
            (root / f"data/{name}/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = EvalSettings(
            ("shipped/gsm8k_answers.yaml", "shipped/mbpp_answers.yaml"), root, allow_code_execution=True
        )
        scores = {score.task: score for score in evaluate(model, settings).scores}

        def bits(prompt, answer):
            return -loglikelihood(*loaded, prompt, answer) / math.log(2) / len(answer)

        loaded = load(model)
        maths = [bits("Question: who sat ?\nAnswer:", " the cat sat\nred"), bits("Question: is\nAnswer:", " a dog")]
        assert scores["gsm8k_answers"].value == pytest.approx(sum(maths) / 2, rel=1e-4)
        assert scores["gsm8k_answers"].stderr == pytest.approx(abs(maths[0] - maths[1]) / 2, rel=1e-4)
        assert scores["mbpp_answers"].value == pytest.approx(bits("the mat\nred is blue", "\ndog\ncat"), rel=1e-4)
        assert scores["mbpp_answers"].stderr is None  # of one document
        assert not any(score.higher_is_better for score in scores.values())

    def test_what_the_lm_eval_command_wrote_is_read_with_every_documents_value(self, model, root, monkeypatch):
        ours = evaluate(model, EvalSettings(("pets", "answers", "written"), root, batch_size=2))
        lm_eval_command(model, root, monkeypatch, "--tasks=pets,answers,written", "--log_samples")
        theirs = read_results(root / "out")
        scores = {each.key: (each.value, each.higher_is_better, each.samples) for each in ours.scores}
        assert {each.key: (each.value, each.higher_is_better, each.samples) for each in theirs.scores} == scores
        samples = {each.key: each for each in ours.samples}
        assert {each.key: each for each in theirs.samples} == samples and len(samples) == 4
        prompts = {task: [prompt[:16] for prompt in of] for task, of in theirs.content["prompts"].items()}
        assert ours.content["prompts"] == prompts and set(map(len, prompts.values())) == {len(ROWS)}
        assert ours.content["versions"] == theirs.content["versions"] != {}

    def test_nan_is_no_score(self, model, root, tmp_path):
        llama, tokenizer = load(model)
        llama.model.norm.weight.data.fill_(math.nan)
        llama.save_pretrained(tmp_path / "broken")
        tokenizer.save_pretrained(tmp_path / "broken")
        with pytest.raises(LewisError, match=r"broken: answers/perplexity,none is nan"):
            evaluate(tmp_path / "broken", EvalSettings(("answers",), root, limit=2))
        with pytest.raises(LewisError, match="broken: its likelihoods are NaN"):  # it chose the first choice each time
            evaluate(tmp_path / "broken", EvalSettings(("pets",), root))

    def test_an_empty_choice_has_a_score_and_an_empty_answer_is_named(self, model, root):
        write_rows(root, [" red", "", " red", " red", " red"])
        said = {"doc_to_choice": "{{[said, ' dog', ' blue']}}", "target_delimiter": ""}
        write_task(root / "tasks/pets.yaml", {**CHOICE, **said})
        found = evaluate(model, EvalSettings(("pets",), root))
        assert found.scores and found.ends.perplexity is not None
        write_task(root / "tasks/answers.yaml", {**ANSWERS, "doc_to_target": "said", "target_delimiter": ""})
        with pytest.raises(LewisError, match="task answers: row 2 of its data has an empty answer or choice"):
            evaluate(model, EvalSettings(("answers",), root))

    def test_a_folder_without_a_model(self, root, tmp_path, model):
        with pytest.raises(InputError, match=r"config\.json"):
            evaluate(tmp_path, EvalSettings(("pets",), root))
        with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
            evaluate(model, EvalSettings(("pets",), root), adapter=tmp_path)


class TestSamples:
    def test_every_documents_value_is_kept(self, model, root):
        group = {"group": "both", "task": ["pets", "dogs"], "aggregate_metric_list": [{"metric": "acc"}]}
        write_task(root / "both.yml", group)
        write_task(root / "tasks/dogs.yaml", {**CHOICE, "task": "dogs", "doc_to_text": "Q {{question}}"})
        found = evaluate(model, EvalSettings(("both.yml", "answers", "written"), root))
        llama, tokenizer = load(model)
        samples = {(each.task, each.metric): each for each in found.samples}
        for score in found.scores:
            assert samples[score.task, score.metric].value() == pytest.approx(score.value, rel=1e-9)
        [answers] = samples["answers", "perplexity,none"].parts
        logs = [loglikelihood(llama, tokenizer, row["question"], row["text"]) for row in ROWS]
        assert answers.aggregation == "perplexity" and list(answers.values) == pytest.approx(logs, rel=1e-4)
        pets, dogs = samples["both", "acc,none"].parts
        assert (pets.task, dogs.task) == ("pets", "dogs") and pets.weight == dogs.weight == 0.5
        assert pets.documents == dogs.documents == answers.documents and len(set(answers.documents)) == len(ROWS)

        assert found.ends.tried == 4 and 0 <= found.ends.ended <= 4
        assert found.ends.empty == {"written": 0.0}
        read_again = Evaluated.of("x", json.loads(json.dumps(found.content)))
        assert (read_again.scores, read_again.samples, read_again.ends) == (found.scores, found.samples, found.ends)

    def test_the_guards_see_an_end_token_an_empty_answer_and_the_perplexity_of_the_answers(self, model, root, tmp_path):
        llama, tokenizer = load(model)
        llama.lm_head.weight.data.zero_()  # every token is as likely, the first one (<unk>) is taken
        llama.save_pretrained(tmp_path / "flat")
        tokenizer.save_pretrained(tmp_path / "flat")
        flat = evaluate(tmp_path / "flat", EvalSettings(("written", "answers"), root)).ends
        assert (flat.tried, flat.ended) == (4, 0) and flat.perplexity == pytest.approx(len(tokenizer), rel=1e-4)

        llama = load(tmp_path / "flat")[0]
        llama.generation_config.eos_token_id = 0
        llama.save_pretrained(tmp_path / "ends")
        tokenizer.save_pretrained(tmp_path / "ends")
        ends = evaluate(tmp_path / "ends", EvalSettings(("written",), root)).ends
        assert (ends.tried, ends.ended, ends.empty) == (4, 4, {"written": 1.0})

    def test_the_two_halves_are_disjoint_whole_and_the_limit_counts_within(self, model, root):
        rows = [{"question": f"the sky is {word}", "answer": 2, "text": " red", "said": "-"} for word in WORDS]
        (root / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def documents(which, limit=None):
            found = evaluate(model, EvalSettings(("answers",), root, documents=which, limit=limit))
            return found.samples[0].parts[0].documents

        whole, search, confirm = (documents(which) for which in ("all", "search", "confirm"))
        assert not set(search) & set(confirm) and set(search) | set(confirm) == set(whole)
        assert [each for each in whole if each in search] == list(search) and len(search) > 3 and len(confirm) > 3
        assert documents("confirm", limit=2) == confirm[:2]
        assert documents("search", limit=0.5) == search[: math.ceil(len(search) / 2)]

    def test_a_half_without_documents_is_an_error(self, model, root):
        (root / "data/rows.jsonl").write_text(json.dumps({**ROWS[0], "said": "-"}) + "\n")
        errors = 0
        for which in ("search", "confirm"):
            try:
                evaluate(model, EvalSettings(("answers",), root, documents=which))
            except LewisError as error:
                assert f"too few documents to split: the half `{which}` is empty" in str(error)
                errors += 1
        assert errors == 1


@pytest.fixture
def exposed(monkeypatch):
    """Secrets in the environment."""
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_KEY", "OTHER"):
        monkeypatch.setenv(name, SECRET)


@pytest.mark.usefixtures("exposed")
class TestTrust:
    """What a stranger's task file and a trusted one can reach."""

    @pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "description"])
    def test_a_template_runs_no_command(self, model, root, tmp_path, key):
        mark = tmp_path / "mark"
        template = f"{{{{ cycler.__init__.__globals__.os.popen('env > {mark}').read() }}}}"
        write_task(root / "tasks/pets.yaml", {**CHOICE, key: template})
        with pytest.raises(LewisError, match="SecurityError"):
            evaluate(model, EvalSettings(("pets",), root, limit=1))
        assert not mark.exists()

    def test_code_that_is_allowed_sees_no_secrets(self, model, root, tmp_path):
        """Nor an evaluation at the same time, which knows one: they were in the same namespaces."""
        seen = tmp_path / "seen"
        (root / "tasks/canary.py").write_text(CANARY)
        look = f"__import__('runpy').run_path('{root}/tasks/canary.py')['other_processes']('{SECRET}')"
        task = faulty(
            root,
            f"pathlib.Path('{seen}').write_bytes(open('/proc/self/environ', 'rb').read())\n"
            f"pathlib.Path('{seen}3').write_text(repr((os.getppid(), *{look})))\nreturn rows",
        )
        with (root / "tasks/faulty.py").open("a") as more:
            more.write(f"\nopen('{seen}2', 'w').write(repr(dict(os.environ)))\n")
        common = isolation.without_secrets(os.environ)
        other, before = (
            fork_server.new_child(LM_EVAL, common, loaded=True, network=False, shown=(root,)),
            fork_server._servers[LM_EVAL.module, False],
        )
        try:
            os.write(other._stdin, json.dumps({"environment": {"HF_TOKEN": SECRET}}).encode())  # it waits for the rest
            evaluate(model, EvalSettings((task,), root, limit=1, allow_code_execution=True))
            assert other.poll() is None and fork_server._servers[LM_EVAL.module, False] is before
        finally:
            other.end()
        for text in (seen.read_text(), Path(f"{seen}2").read_text()):
            assert "PATH" in text and SECRET not in text
        if isolation._possible():
            keeper, children, knowing = ast.literal_eval(Path(f"{seen}3").read_text())
            assert children == [keeper] and not knowing

    def test_code_that_came_after_the_check_is_refused(self, model, root, monkeypatch):
        task = faulty(root, "return rows")
        monkeypatch.setattr("lewis.evaluation.harness.lm_eval.check_code", lambda *_: None)
        with pytest.raises(LewisError, match=r"!function faulty.docs of .*`allow_code_execution: true`"):
            evaluate(model, EvalSettings((task,), root, limit=1))


class TestBadEnds:
    def test_an_exception_in_a_task_is_in_the_message(self, model, root):
        (root / "tasks/broken.py").write_text("def docs(rows):\n    raise ValueError('row 3 has no answer')\n")
        config = {**CHOICE, "task": "broken"}
        write_task(root / "tasks/broken.yaml", config, "process_docs: !function broken.docs\n")
        (root / "random.py").write_text("raise SystemExit('this is not the library')")
        with pytest.raises(
            LewisError, match=r"exit code 1\): ValueError: task broken: .*: ValueError: row 3 has no answer"
        ) as caught:
            evaluate(model, EvalSettings(("broken",), root, allow_code_execution=True))
        assert str(model) in str(caught.value)

    def test_a_row_that_is_no_json_is_named(self, model, root):
        (root / "data/rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
        with pytest.raises(LewisError, match=r"task pets: .*: ArrowInvalid: JSON parse error: .* in row 1"):
            evaluate(model, EvalSettings(("pets",), root))

    def test_a_signal_is_named_and_the_next_evaluation_is_none_the_worse(self, model, root):
        task = faulty(root, "print('loading')\nos.kill(os.getpid(), signal.SIGKILL)")
        with pytest.raises(LewisError, match=r"(?s)killed by SIGKILL: out of memory\?.*loading"):
            evaluate(model, EvalSettings((task,), root, allow_code_execution=True))
        assert evaluate(model, EvalSettings(("pets",), root)).scores

    def test_the_time_limit_kills_the_child_and_its_children(self, model, root, tmp_path, monkeypatch):
        lock = tmp_path / "lock"
        task = faulty(root, hold(lock) + "time.sleep(600)")
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 500 * lock.exists(), sleep=time.sleep)
        monkeypatch.setattr(process, "time", clock)
        with pytest.raises(LewisError, match="did not finish within 400 s"):
            evaluate(model, EvalSettings((task,), root, allow_code_execution=True, timeout_s=400))
        assert wait_until(lambda: not held(lock))

    def test_an_interrupt_kills_the_child(self, model, root, tmp_path):
        lock = tmp_path / "lock"
        task = faulty(
            root,
            hold(lock)
            + "print('Running loglikelihood requests:  10%|#  | 1/10 [00:01<00:09]', end='\\r', flush=True)\n"
            "time.sleep(600)",
        )

        def interrupt(what, done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, EvalSettings((task,), root, allow_code_execution=True), progress=interrupt)
        assert wait_until(lambda: not held(lock))

    def test_child_and_server_die_with_a_killed_parent(self, model, root, tmp_path):
        lock = tmp_path / "lock"
        task = faulty(root, hold(lock) + "time.sleep(600)")
        code = (
            "import sys; from pathlib import Path; from lewis.evaluation.harness.lm_eval import *\n"
            "settings = EvalSettings((sys.argv[3],), Path(sys.argv[2]), allow_code_execution=True)\n"
            "evaluate(Path(sys.argv[1]), settings)"
        )
        command = [sys.executable, "-c", code, str(model), str(root), task]
        with subprocess.Popen(command, start_new_session=True) as parent:
            try:
                assert wait_until(lock.exists, 300) and held(lock)
                forking = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
            finally:
                os.kill(parent.pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(forking) and not held(lock), 120)

    @pytest.mark.parametrize("own_session", [False, True])
    def test_what_an_evaluation_leaves_running_is_ended(self, model, root, tmp_path, own_session):
        task = faulty(root, hold(tmp_path / "lock", own_session) + "return rows")
        evaluate(model, EvalSettings((task,), root, limit=1, allow_code_execution=True))
        assert wait_until(lambda: not held(tmp_path / "lock"))

    def test_a_killed_server_is_replaced(self, model, root):
        evaluate(model, EvalSettings(("pets",), root))
        dead = fork_server._servers[LM_EVAL.module, False]
        dead._process.kill()
        dead._process.wait()
        assert select.select([dead._socket], [], [], 10)[0]  # what runs in its namespaces has ended too
        assert evaluate(model, EvalSettings(("pets",), root)).scores
        assert fork_server._servers[LM_EVAL.module, False] is not dead

    def test_for_a_device_that_a_fork_would_break_nothing_is_loaded_before(self):
        before, others = fork_server._servers[LM_EVAL.module, False], servers()
        child = fork_server.new_child(LM_EVAL, dict(os.environ), loaded=False, network=False)
        assert wait_until(lambda: child.poll() is None and len(servers() - others) >= 3)  # server, keeper, child
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in servers() - others]
        child.send({})  # without an environment
        assert wait_until(lambda: child.poll() == 1)
        assert "KeyError: 'environment'" in os.read(child.stdout, 65536).decode()
        child.end()
        assert (
            all("python" in each and "torch" not in each for each in maps)
            and fork_server._servers[LM_EVAL.module, False] is before
        )


class TestOtherSurroundings:
    """Each needs a fork server of its own, which takes four seconds: last, so that none is started once more."""

    @pytest.mark.long
    def test_documents_of_a_hub_that_may_be_busy_have_their_commit(self, model, root, tmp_path, monkeypatch):
        config = {key: value for key, value in CHOICE.items() if key not in DATA}
        write_task(root / "hub.yaml", {**config, "task": "hub", "dataset_path": "org/rows", "test_split": "test"})
        with LocalHub(tmp_path / "server") as hub:
            for name, value in hub.environment(tmp_path / "cache").items():
                monkeypatch.setenv(name, value)
            text = "".join(json.dumps(row) + "\n" for row in ROWS)
            commit = hub.commit("org/rows", {"test.jsonl": text}, repo_type="dataset")
            busy = {"path": "datasets/org/rows", "status": 429, "headers": {"Retry-After": "1"}, "times": 7}
            hub.faults += [busy] * bool(POINTS)
            found = evaluate(model, EvalSettings(("hub.yaml", "pets"), root)).content["sources"]
        assert found == {"hub": {"path": "org/rows", "config_name": None, "split": "test", "revision": commit}}

    @pytest.mark.usefixtures("exposed")
    def test_code_that_is_allowed_finds_no_secrets(self, model, root, tmp_path, monkeypatch):
        """Not in any file, environment or socket; Prefect's worker keeps its whole environment in a temporary file."""
        if not isolation._possible():
            pytest.skip("this machine makes no namespaces")
        (tmp_path / "home").mkdir(exist_ok=True)
        names = ("webhook-secret", "mlflow-password", "metrics-key", "open.html", "prefect/x.db", ".netrc", ".ssh/id")
        for name in names:
            (tmp_path / "home" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "home" / name).write_text(SECRET)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        told = tmp_path / "told"
        (root / "tasks/canary.py").write_text(CANARY)
        unseen = f"lewis-{SECRET[::-1]}"  # a socket without a file
        look = f"__import__('runpy').run_path('{root}/tasks/canary.py')['look']('{SECRET}', sockets=['\\0{unseen}'])"
        task = faulty(root, f"pathlib.Path('{told}').write_text(repr({look}))\nreturn rows")
        with ExitStack() as stack:
            for folder in filter(os.path.isdir, {tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"}):
                place = stack.enter_context(tempfile.TemporaryDirectory("", "prefect-workspace-attempt-", folder))
                Path(place, "workspace.json").write_text(json.dumps({"environment": {"TOKEN": SECRET}}))
                listening = stack.enter_context(socket.socket(socket.AF_UNIX))
                listening.bind(f"{place}/socket")
                listening.listen()
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(f"\0{unseen}")
            listening.listen()
            canary = runpy.run_path(str(root / "tasks/canary.py"))
            assert f"\0{unseen}" in filter(canary["answers"], canary["abstract"]())  # out here
            evaluate(model, EvalSettings((task,), root, limit=1, allow_code_execution=True))
        seen, found, interfaces = ast.literal_eval(told.read_text())
        assert seen > 10 and not found and interfaces == [(1, "lo")]

    @pytest.mark.long
    def test_a_recipe_that_lies_among_the_temporary_files_has_its_data(self, model, root, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(root))
        assert evaluate(model, EvalSettings(("pets",), root, limit=1)).scores


class TestCheckTasks:
    def test_the_recipes_own_tasks_are_fine(self, root):
        check_tasks(EvalSettings(("pets", "tasks/answers.yaml", "written"), root))

    @pytest.mark.usefixtures("lm_eval_tasks")
    def test_unknown_and_unsafe_names(self, root):
        with pytest.raises(InputError, match=r"'gsm8kk', which is neither; did you mean .*gsm8k"):
            check_tasks(EvalSettings(("gsm8kk",), root))
        with pytest.raises(InputError, match="did you mean answers"):
            check_tasks(EvalSettings(("answer",), root))
        with pytest.raises(InputError, match="humaneval of lm-eval runs code that the model writes"):
            check_tasks(EvalSettings(("humaneval",), root, allow_code_execution=True))
        check_tasks(EvalSettings(("gsm8k", "mmlu"), root))

    def test_unsafe_code_in_an_included_file(self, root):
        write_task(root / "tasks/base.yaml", {"unsafe_code": True})
        write_task(root / "tasks/code.yaml", {**CHOICE, "task": "code", "include": "base.yaml"})
        with pytest.raises(InputError, match=r"code runs code.*`allow_code_execution: true`"):
            check_tasks(EvalSettings(("code",), root))
        check_tasks(EvalSettings(("code",), root, allow_code_execution=True))
        write_task(root / "tasks/base.yaml", {"unsafe_code": False})
        check_tasks(EvalSettings(("code",), root))

    @pytest.mark.parametrize(
        ("change", "function", "message"),
        [
            (
                {"dataset_kwargs": {"data_files": "data/missing.jsonl"}},
                "",
                r"'data/missing\.jsonl' is missing or empty",
            ),
            ({"dataset_kwargs": {"data_files": {"test": ["data/*.csv"]}}}, "", r"'data/\*\.csv' is missing or empty"),
            ({"dataset_kwargs": {"data_files": "data/empty.jsonl"}}, "", r"'data/empty\.jsonl' is missing or empty"),
            ({"include": "absent.yaml"}, "", r"absent\.yaml"),
            ({"dataset_kwargs": {"data_files": 5}}, "", "'5' is missing or empty"),
            ({"include": 5}, "", r"own\.yaml: not a readable lm-eval task"),
            ({"metric_list": [{"metric": {"f1": 1}}]}, "", r"a script of .* \(metric: \{'f1': 1\}\)"),
            ({"include": "own.yaml"}, "", "included twice"),
            ({}, "process_docs: !function nowhere.docs\n", r"no file .*nowhere\.py"),
            ({}, "oops: [\n", r"own\.yaml: not a readable lm-eval task"),
            ({"task": None}, "", "expected the key `task`"),
            ({"doc_to_tex": "x"}, "", r"own\.yaml: doc_to_tex: unknown key .*; did you mean 'doc_to_text'"),
            ({"test_split": "tset"}, "", r"own\.yaml: test_split: no split 'tset' in data_files; did you mean 'test'"),
            ({"doc_to_text": "{{q"}, "", r"own\.yaml: doc_to_text: not a valid Jinja template: unexpected end"),
            (
                {"doc_to_text": "{{question|uper}}"},
                "",
                r"doc_to_text: not a valid Jinja template: No filter named 'uper'",
            ),
        ],
    )
    def test_a_broken_file(self, root, change, function, message):
        (root / "data/empty.jsonl").touch()
        write_task(root / "tasks/own.yaml", {**CHOICE, "task": "own", **change}, function)
        with pytest.raises(InputError, match=message):
            check_tasks(EvalSettings(("tasks/own.yaml",), root))

    def test_of_the_splits_only_those_that_are_read_must_exist(self, root):
        of_task = {"test_split": "test", "training_split": "test", "validation_split": "none"}
        config = {**CHOICE, "dataset_kwargs": {"data_files": {"test": "x.jsonl"}}, **of_task}
        check_config(TaskFile("x", root / "own.yaml", config, (), ()), root)
        with pytest.raises(InputError, match="training_split: no split 'none'"):
            check_config(TaskFile("x", root / "own.yaml", {**config, "training_split": "none"}, (), ()), root)
        config |= {"fewshot_split": "none", "fewshot_config": {"split": "test"}}
        check_config(TaskFile("x", root / "own.yaml", config, (), ()), root)
        config |= {"fewshot_split": "test", "fewshot_config": {"split": "none"}}
        with pytest.raises(InputError, match="fewshot_config: split: no split 'none'"):
            check_config(TaskFile("x", root / "own.yaml", config, (), ()), root)

    def test_a_number_as_a_split_in_data_files_is_the_text(self, root):
        config = {**CHOICE, "dataset_kwargs": {"data_files": {2024: "x.jsonl"}}, "test_split": "2024"}
        check_config(TaskFile("x", root / "own.yaml", config, (), ()), root)
        with pytest.raises(InputError, match="test_split: no split '2025' in data_files; did you mean '2024'"):
            check_config(TaskFile("x", root / "own.yaml", {**config, "test_split": "2025"}, (), ()), root)

    @pytest.mark.parametrize("files", ["x.jsonl", ["x.jsonl"]])
    def test_data_files_without_splits_are_one_that_is_named_train(self, root, files):
        config = {**CHOICE, "dataset_kwargs": {"data_files": files}, "test_split": "train"}
        check_config(TaskFile("x", root / "own.yaml", config, (), ()), root)
        with pytest.raises(InputError, match="test_split: no split 'test' in data_files; expected one of train"):
            check_config(TaskFile("x", root / "own.yaml", {**config, "test_split": "test"}, (), ()), root)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"filter_list": []}, r"filter_list: expected at least one item, or no such key, got \[\]"),
            ({"metric_list": []}, r"metric_list: expected at least one item, or no such key, got \[\]"),
            ({"generation_kwargs": {"until": 5}}, "generation_kwargs: until: expected a text or a list, got 5"),
            ({"generation_kwargs": {"max_gen_toks": "x"}}, "generation_kwargs: max_gen_toks: expected a whole number"),
            (
                {"generation_kwargs": {"temperature": "x"}},
                "generation_kwargs: temperature: expected a whole number or a",
            ),
            ({"generation_kwargs": {"until": ["?"], "temperature": 0.5, "max_gen_toks": 5, "do_sample": True}}, None),
            ({"repeats": 0}, "repeats: expected at least 1, got 0"),
            (
                {"metric_list": [{"metric": "acc", "aggregation": "f1"}]},
                "aggregation: lm-eval cannot take the f1 of acc; expected mean",
            ),
            (
                {"metric_list": [{"metric": "f1", "aggregation": "mean"}]},
                "aggregation: lm-eval cannot take the mean of f1; expected f1",
            ),
            ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, None),
            ({"output_type": "generate_untill"}, "output_type: lm-eval has no 'generate_untill'; did you mean 'gen"),
            (
                {"metric_list": [{"metric": "acc", "aggregation": "avg"}]},
                "metric_list: aggregation: lm-eval has no 'avg'",
            ),
            (
                {"filter_list": [{"name": "x", "filter": [{"function": "take_frist"}]}]},
                "filter_list: function: lm-eval has no 'take_frist'; did you mean 'take_first'",
            ),
            (
                {"doc_to_text": "{{query}}"},
                r"doc_to_text: 'query' is undefined; .*rows\.jsonl has the columns answer, q",
            ),
            ({"test_split": None}, r"test_split \(or validation_split\): missing; lm-eval needs it"),
            ({"doc_to_text": None}, "doc_to_text: missing"),
            ({"doc_to_target": None}, "doc_to_target: missing"),
            ({"doc_to_choice": None}, "doc_to_choice: missing"),
            ({"doc_to_choice": None, "output_type": "generate_until"}, None),
            ({"doc_to_target": "anwser"}, None),  # a text that is no column is a template
            ({"doc_to_text": "{% if hint is defined %}{{hint}}{% endif %}{{question}}"}, None),
            ({"doc_to_text": "{{ question | regex_replace('a', 'b') }}{{ text.none }}"}, None),
            ({"doc_to_text": "{{query}}", "process_docs": "own.docs"}, None),
            ({"filter_list": [{"name": "x", "filter": [{"function": "own"}]}], "process_docs": "own.docs"}, None),
            ({"num_fewshot": 6}, r"num_fewshot: 6 examples need 6 rows, and .*rows\.jsonl has 5; set fewer"),
            ({"num_fewshot": 5}, None),
            ({"num_fewshot": 5, "fewshot_split": "test"}, "5 examples need 6 rows"),
            ({"num_fewshot": 5, "test_split": None, "validation_split": "test"}, "5 examples need 6 rows"),
            (
                {"num_fewshot": 5, **dict.fromkeys(("fewshot_split", "validation_split"), "test"), "test_split": None},
                None,
            ),
            ({"num_fewshot": 5, "fewshot_config": {"samples": [ROWS[0]] * 5}}, None),
            (
                {"num_fewshot": 5, "fewshot_config": {"samples": [{}] * 5}},
                "expected the key 'question' in each, as in ",
            ),
            ({"num_fewshot": 5, "fewshot_config": {"samples": [ROWS[0]] * 4}}, "num_fewshot is 5, and there are 4"),
            (
                {"fewshot_config": {"samples": "x"}},
                "fewshot_config: samples: expected a list of mappings, or .*got 'x'",
            ),
            ({"fewshot_config": {"samples": ["x"]}}, r"fewshot_config: samples: expected a list of map.*got \['x'\]"),
            ({"fewshot_config": {"samples": "own.docs"}}, None),
            ({"fewshot_config": {"process_docs": "x"}}, "fewshot_config: process_docs: expected !function"),
            ({"fewshot_config": {"split": 2024}}, "fewshot_config: split: expected a text, got 2024"),
            ({"fewshot_config": {"doc_to_text": ["a"]}}, "fewshot_config: doc_to_text: expected a text or a whole num"),
            ({"num_fewshot": -1}, None),
            ({"doc_to_choice": ["cat", True]}, "doc_to_choice: expected texts, in quotes and not empty, got True"),
            ({"doc_to_choice": {"a": ""}}, "doc_to_choice: expected texts, in quotes and not empty, got ''"),
            ({"doc_to_choice": []}, r"doc_to_choice: expected at least one choice, got \[\]"),
            ({"doc_to_choice": "anwser"}, r"rows\.jsonl has no column 'anwser'; did you mean 'answer'"),
            ({"doc_to_choice": "['1', '2', '{{answer}}']"}, None),
            ({"doc_to_choice": "[1, 2, {{answer}}]"}, r"expected a list of texts in the first .*, got \[1, 2, 2\]"),
            (
                {"doc_to_choice": "{{question}}"},
                "expected a list of texts in the first document of .*, got 'the sky is'",
            ),
            ({"doc_to_choice": "{{'-' * 99999}}1"}, "doc_to_choice: expected a list of texts in the first document of"),
            ({"doc_to_choice": "text"}, "doc_to_choice: expected a list of texts in the first .*, got ' red'"),
            ({"doc_to_choice": ["cat", "dog"]}, "doc_to_target: expected the index of one of 2 choices.* got 2"),
            ({"doc_to_choice": {"a": "cat", "b": "dog"}, "doc_to_target": 1}, None),
            ({"doc_to_target": "{{answer + 1}}"}, "expected the index of one of 3 choices, from 0, .* got 3"),
            ({"doc_to_target": "{{answer + 1}}", "process_docs": "own.docs"}, None),
            ({"doc_to_target": "{{answer + 1}}", "doc_to_choice": "own.docs"}, None),
            (
                {"output_type": "generate_until", "doc_to_target": "text", "metric_list": [{"metric": "exact_match"}]},
                "doc_to_target: expected the index of a choice .* has doc_to_choice, got ' red'",
            ),
            ({"test_split": ["test"]}, r"test_split: expected a text, got \['test'\]"),
            ({"doc_to_target": {"a": 1}}, "doc_to_target: expected a text or a whole number or a list, got"),
            ({"num_fewshot": "5"}, "num_fewshot: expected a whole number, got '5'"),
            ({"process_docs": "docs"}, "process_docs: expected !function MODULE.NAME, got 'docs'"),
            ({"description": "{{topic}}: "}, "description: 'topic' is undefined"),
            ({"dataset_kwargs": None}, "dataset_kwargs: data_files: missing"),
            ({"dataset_path": None}, "dataset_path: missing"),
            ({"fewshot_config": {"num_fewshot": 1}}, "fewshot_config: num_fewshot: unknown key"),
            ({"fewshot_config": {"sampler": "first"}}, "fewshot_config: sampler: lm-eval has no 'first'"),
            ({"metric_list": ["acc"]}, "metric_list: expected mappings with metric, got 'acc'"),
            ({"filter_list": [{"filter": []}]}, "filter_list: expected mappings with name and filter"),
            (
                {"filter_list": [{"name": "x", "filter": ["take_first"]}]},
                "filter_list: filter: expected mappings with function, got 'take_first'",
            ),
            ({"filter_list": [{"name": "x", "filter": {"function": "take_first"}}]}, "filter: expected a list of map"),
            (
                {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}, {"metric": "acc"}]},
                "metric_list: metric: lm-eval has no acc for output_type generate_until; expected one of bleu",
            ),
            ({"metric_list": [{"metric": "bleu"}]}, "lm-eval has no bleu for output_type multiple_choice"),
            ({"metric_list": [{"metric": "acc"}, {"metric": "bleu"}]}, None),  # lm-eval leaves it out
        ],
    )
    def test_what_lm_eval_refuses_when_it_loads_a_task_is_refused_before(self, root, change, message):
        values = [*change.values(), *change.get("fewshot_config", {}).values()]
        functions = tuple(str(text) for text in values if text == "own.docs")
        task = TaskFile("pets", root / "own.yaml", {**CHOICE, **change}, (), functions)
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            check_config(task, root)

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            (
                {"function": "regex", "pattern": "x"},
                r"x: lm-eval cannot apply regex with {'pattern': 'x'}: .*unexpected",
            ),
            ({"function": "regex", "regex_pattern": "(x"}, "lm-eval cannot apply regex with .*unterminated subpattern"),
            (
                {"function": "regex", "regex_pattern": "(.)", "group_select": "1"},
                "cannot apply regex with .*must be int",
            ),
            ({"function": "regex", "regex_pattern": "(.)", "group_select": 3}, None),  # an answer may have four of them
            ({"function": "take_first_k"}, "cannot apply take_first_k with {}: expected the argument 'k'"),
            ({"function": "take_first_k", "k": 3}, "with {'k': 3}: Need at least 3 responses .* TaskConfig.repeats"),
            ({"function": "take_first_k", "k": 2}, None),
            ({"function": "multi_choice_regex"}, None),
            ({"function": "custom", "filter_fn": "own"}, "cannot apply custom with .*not callable"),
            ({"function": "custom", "filter_fn": "own.answers"}, None),  # a function of the recipe is not called
        ],
    )
    def test_filters_are_tried_before_the_model_has_answered(self, root, step, message):
        config = {**WRITTEN, "repeats": 2, "filter_list": [{"name": "x", "filter": [step]}]}
        functions = ("own.answers",) if message is None else ()
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            check_config(TaskFile("written", root / "own.yaml", config, (), functions), root)

    @pytest.mark.parametrize("config", [CHOICE, ANSWERS])
    def test_filters_of_likelihoods_leave_them_as_they_are(self, root, config):
        for steps, right in ((["take_first"], True), (["majority_vote"], False), (["regex", "take_first"], False)):
            filters = [{"name": "x", "filter": [{"function": step} for step in steps]}]
            with contextlib.nullcontext() if right else pytest.raises(InputError, match="end with take_first, since"):
                check_config(TaskFile("own", root / "own.yaml", {**config, "filter_list": filters}, (), ()), root)

    @pytest.mark.parametrize("options", [{"ignore_cases": True}, {"regexes_to_ignore": ["("]}])
    def test_arguments_of_exact_match_are_tried_before_the_model_has_answered(self, root, options):
        metric = {"metric": "exact_match", "aggregation": "mean", "ignore_case": True, "regexes_to_ignore": [","]}
        check_config(TaskFile("own", root / "own.yaml", {**WRITTEN, "metric_list": [metric]}, (), ()), root)
        task = TaskFile("own", root / "own.yaml", {**WRITTEN, "metric_list": [{**metric, **options}]}, (), ())
        with pytest.raises(
            InputError, match=r"metric_list: lm-eval cannot compute exact_match with .*: .*(un|missing)"
        ):
            check_config(task, root)

    @pytest.mark.parametrize("more", [{"task": [{"task": "own", "num_fewshot": 0}]}, {"num_fewshot": 0}])
    def test_a_task_that_a_group_changes_is_not_checked_as_its_file_says(self, root, more):
        write_task(root / "tasks/own.yaml", {**CHOICE, "task": "own", "num_fewshot": 9})
        group = {"group": "several", "task": [{"task": "own", "task_alias": "x"}]}
        write_task(root / "tasks/several.yaml", group)
        with pytest.raises(InputError, match="num_fewshot: 9 examples need 9 rows"):
            check_tasks(EvalSettings(("several",), root))
        write_task(root / "tasks/several.yaml", {**group, **more})
        check_tasks(EvalSettings(("several",), root))
        with pytest.raises(InputError, match="num_fewshot: 9 examples need 9 rows"):
            check_tasks(EvalSettings(("several", "own"), root))

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ({"task": [{**CHOICE, "task": "new"}]}, None),
            ({"task": [{**CHOICE, "task": "new", "doc_to_txt": "x"}]}, "doc_to_txt: unknown key of a task of lm-eval"),
            ({"task": [{**CHOICE, "task": "new", "doc_to_text": "{{query}}"}]}, "doc_to_text: 'query' is undefined"),
            ({"task": [{"task": "pets", "test_split": "none"}]}, "test_split: no split 'none'"),
            ({"task": ["pets"], "num_fewshots": 1}, "num_fewshots: unknown key"),
            ({"task": [{"group": "inner", "task": ["pets"], "num_fewshot": 9}]}, "9 examples need 9 rows"),
            ({"task": ["pets", "several"]}, "group several: it contains itself"),
            ({"task": [{"num_fewshot": 1}]}, "expected the name of a task, or a mapping with `task` or `group`"),
            (
                {"task": ["pets"], "aggregate_metric_list": [{"metric": "acc", "aggregation": "sum"}]},
                "aggregate_metric_list: .*'mean' is the only pre-defined aggregation",
            ),
            ({"task": ["pets"], "aggregate_metric_list": ["acc"]}, "aggregate_metric_list: 'acc': "),
            *(
                (
                    {"task": ["pets"], "aggregate_metric_list": [{"metric": "acc", "filter_list": given}]},
                    f"aggregate_metric_list: filter_list: expected names of filters, got {re.escape(repr(given))}",
                )
                for given in (5, True, "", [], [5], {"none": 1})
            ),
            ({"task": ["pets"], "aggregate_metric_list": {"metric": "acc", "filter_list": "none"}}, None),
            ({"task": "pets"}, "several.yaml: task: expected a list of members, got 'pets'"),  # lm-eval took none
            ({"task": []}, r"several.yaml: task: expected a list of members, got \[\]"),
        ],
    )
    def test_the_members_of_a_group_are_checked_as_lm_eval_loads_them(self, root, group, message):
        write_task(root / "tasks/several.yaml", {"group": "several", **group})
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            check_tasks(EvalSettings(("several",), root))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({}, None),
            ({"doc_to_text": "{{query}}"}, r"'query' is undefined; .*rows\.csv has the columns answer, question, text"),
            ({"doc_to_choice": "text"}, "doc_to_choice: expected a list of texts in the first .*, got 'red'"),
            ({"doc_to_choice": ["cat", "dog"]}, "expected the index of one of 2 choices, from 0, .* got 2"),
            ({"num_fewshot": 6}, r"num_fewshot: 6 examples need 6 rows, and .*rows\.csv has 5"),
        ],
    )
    def test_rows_of_a_csv_are_checked_as_others(self, root, change, message):
        rows = "".join(f"{row['question']},{row['answer']},{row['text'].strip()}\n" for row in ROWS)
        (root / "data/rows.csv").write_text(f"question,answer,text\n{rows}")
        options = {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "data/rows.csv"}}}
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            check_config(TaskFile("pets", root / "own.yaml", {**CHOICE, **options, **change}, (), ()), root)

    def test_a_tag_of_the_recipes_files_stands_for_the_tasks_that_have_it(self, model, root):
        for name, tag in {"cats": "furry", "dogs": ["furry", "loud"]}.items():
            write_task(root / f"tasks/{name}.yaml", {**CHOICE, "task": name, "tag": tag})
        group = {"group": "several", "task": ["furry"], "aggregate_metric_list": [{"metric": "acc"}]}
        write_task(root / "tasks/several.yaml", group)
        for asked in ("several", "furry"):
            check_tasks(EvalSettings((asked,), root))
            found = {score.task for score in evaluate(model, EvalSettings((asked,), root)).scores}
            assert found - {"several"} == {"cats", "dogs"} == set(configs_and_scores([asked], root)) - {asked, "furry"}
        write_task(root / "tasks/dogs.yaml", {**CHOICE, "task": "dogs", "tag": "furry", "num_fewshot": 9})
        for asked in ("several", "furry"):
            with pytest.raises(InputError, match="num_fewshot: 9 examples need 9 rows"):
                check_tasks(EvalSettings((asked,), root))
        write_task(root / "tasks/several.yaml", {**group, "task": [{"task": "furry", "num_fewshot": 1}]})
        with pytest.raises(InputError, match="task: furry is a tag, which has no keys of its own; list its tasks"):
            check_tasks(EvalSettings(("several",), root))

    def test_examples_that_the_recipe_asks_for_need_rows_but_not_where_a_task_sets_0(self, root):
        task = TaskFile("pets", root / "own.yaml", CHOICE, (), ())
        with pytest.raises(InputError, match="num_fewshot: 7 examples need 7 rows"):
            check_config(task, root, 7)
        check_config(replace(task, config={**CHOICE, "num_fewshot": 0}), root, 7)

    @pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target"])
    def test_a_template_runs_no_code_before_the_sandbox(self, root, key):
        code = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}{{ absent is defined }}" % (root / "made")
        Environment().from_string(code).render()
        (root / "made").rmdir()  # it would have run
        check_config(TaskFile("pets", root / "own.yaml", {**CHOICE, key: code}, (), ()), root)  # lm-eval will say so
        assert not (root / "made").exists()

    def test_a_column_that_only_later_rows_have_fills_a_template(self, root):
        (root / "data/rows.jsonl").write_text('{"question": "a"}\n\n{"question": "b", "query": "c"}\n')
        task = TaskFile("pets", root / "own.yaml", {**CHOICE, "doc_to_text": "{{query}}", "doc_to_target": 0}, (), ())
        check_config(task, root)

    @pytest.mark.parametrize(
        ("text", "options"),
        [
            (json.dumps(ROWS), {}),
            (json.dumps(ROWS[0]) * 2, {}),
            (json.dumps(ROWS[0], indent=1), {}),
            (json.dumps({"data": ROWS}), {"field": "data"}),
            (json.dumps({"of": "another file"}), {"data_dir": "sub"}),
        ],
    )
    def test_what_lm_eval_may_read_in_another_way_is_left_to_it(self, root, text, options):
        (root / "data/rows.jsonl").write_text(text)
        options = {**CHOICE["dataset_kwargs"], **options}
        config = {**CHOICE, "doc_to_text": "{{question}}", "dataset_kwargs": options}
        check_config(TaskFile("pets", root / "own.yaml", config, (), ()), root, 1)

    def test_a_missing_file_and_a_name_defined_twice(self, root):
        with pytest.raises(InputError, match=r"absent\.yaml: not a readable lm-eval task"):
            check_tasks(EvalSettings(("absent.yaml",), root))
        write_task(root / "again.yaml", CHOICE)
        with pytest.raises(InputError, match=r"again\.yaml: its task 'pets' is defined by .*pets\.yaml as well"):
            check_tasks(EvalSettings(("tasks/pets.yaml", "again.yaml"), root))

    def test_a_dataset_of_the_hub_is_not_looked_for_here(self, root):
        write_task(root / "tasks/own.yaml", {**CHOICE, "task": "own", "dataset_path": "org/pets"})
        check_tasks(EvalSettings(("own",), root))


class TestDigest:
    @pytest.fixture
    def coded(self, root):
        (root / "tasks/code.py").write_text("def docs(rows):\n    return rows\n")
        write_task(root / "tasks/common.yaml", {"num_fewshot": 0})
        config = {**CHOICE, "task": "coded", "include": "common.yaml"}
        write_task(root / "tasks/coded.yaml", config, "process_docs: !function code.docs\n")
        return root

    @pytest.mark.parametrize("file", ["tasks/coded.yaml", "tasks/common.yaml", "tasks/code.py", "data/rows.jsonl"])
    def test_changes_with_every_file_it_depends_on(self, coded, file):
        settings = EvalSettings(("pets", "coded"), coded)
        before = tasks_digest(settings)
        (coded / file).write_text((coded / file).read_text() + "\n")
        assert tasks_digest(settings) != before

    @pytest.mark.parametrize("file", ["helper.py", "kit/__init__.py", "kit/deep.py"])
    def test_changes_with_the_files_that_its_functions_import(self, coded, file):
        (coded / "tasks/kit").mkdir()
        for name in ("helper.py", "kit/__init__.py", "kit/deep.py", "other.py"):
            (coded / "tasks" / name).write_text("x = 0\n")
        (coded / "tasks/code.py").write_text(
            "import helper\ndef docs(rows):\n    from kit import deep\n    return rows\n"
        )
        (coded / "tasks/helper.py").write_text("import code, os.path\n")  # a circle
        settings = EvalSettings(("coded",), coded)
        before = tasks_digest(settings)
        (coded / "tasks/other.py").write_text("x = 1\n")
        assert tasks_digest(settings) == before
        (coded / "tasks" / file).write_text("x = 1\n")
        assert tasks_digest(settings) != before

    def test_changes_with_the_file_of_its_prompt(self, root):
        """Scores were found again after the prompt was edited."""
        write_task(root / "tasks/asked.yaml", {**ANSWERS, "task": "asked", "use_prompt": "prompts.yaml:short"})
        settings = EvalSettings(("asked",), root, allow_code_execution=True)
        with pytest.raises(InputError, match=r"asked.yaml: use_prompt: no file .*/recipe/prompts.yaml; put or link it"):
            check_tasks(settings)
        (root / "prompts.yaml").write_text("prompts: {short: {doc_to_text: 'Q: {{question}}'}}\n")
        before = tasks_digest(settings)
        (root / "prompts.yaml").write_text("prompts: {short: {doc_to_text: '{{question}}'}}\n")
        assert tasks_digest(settings) != before

    @pytest.mark.parametrize(("module", "file"), [("metrics_of_ours", "__init__.py"), ("metrics_of_ours.of", "of.py")])
    def test_changes_with_a_package_that_its_functions_are_in(self, coded, tmp_path, monkeypatch, module, file):
        """Scores were found again after a new version of the package."""
        package = tmp_path / "installed/metrics_of_ours"
        package.mkdir(parents=True)
        for name in ("__init__.py", "of.py"):
            (package / name).write_text("def docs(rows):\n    return rows\n")
        monkeypatch.syspath_prepend(package.parent)
        write_task(coded / "tasks/far.yaml", {**CHOICE, "task": "far"}, f"process_docs: !function {module}.docs\n")
        settings = EvalSettings(("far",), coded)
        before = tasks_digest(settings)
        (package / file).write_text("def docs(rows):\n    return rows[1:]\n")
        assert tasks_digest(settings) != before
        assert module not in sys.modules

    def test_covers_what_changes_scores_and_nothing_else(self, coded, tmp_path):
        def digest(**options):
            return tasks_digest(EvalSettings(**{"tasks": ("pets", "coded"), "root": coded, **options}))

        same = [{}, {"batch_size": "auto"}, {"timeout_s": 1}, {"tasks": ("coded", "pets")}]
        assert len({digest(**options) for options in same}) == 1
        other = [{}, {"limit": 3}, {"num_fewshot": 2}, {"apply_chat_template": True}, {"tasks": ("pets",)}]
        other += [{"documents": "search"}, {"documents": "confirm"}, {"allow_code_execution": True}]
        assert len({digest(**options) for options in other}) == len(other)
        (coded / "unrelated.yaml").write_text("task: unrelated\n")
        before = digest()
        assert digest(root=coded.rename(tmp_path / "moved")) == before

    def test_of_a_task_alone_is_the_same_in_any_company(self, coded):
        """Also of one that is found only next to another task of the recipe."""
        (coded / "more").mkdir()
        write_task(coded / "more/mats.yaml", {**CHOICE, "task": "mats"})
        write_task(coded / "more/rows.yaml", {**CHOICE, "task": "rows"})
        settings = EvalSettings(("tasks/pets.yaml", "coded", "more/mats.yaml", "rows"), coded)
        pets, code, mats, rows = map(tasks_digest, settings.by_task())
        assert pets == tasks_digest(EvalSettings(("pets",), coded)) and code == tasks_digest(
            EvalSettings(("coded",), coded)
        )
        assert mats == tasks_digest(EvalSettings(("more/mats.yaml",), coded))
        assert rows == tasks_digest(EvalSettings(("more/rows.yaml",), coded))

    def test_a_name_that_two_folders_define_is_that_of_the_first_file_of_the_recipe(self, root):
        """Alone, a task of the second file was looked up next to that: another one was checked than scored."""
        for folder, member in (("a", CHOICE), ("b", ANSWERS)):
            (root / folder).mkdir()
            write_task(root / folder / "inner.yaml", {**member, "task": "inner"})
            write_task(root / folder / "group.yaml", {"group": folder, "task": ["inner"]})
        settings = EvalSettings(("a/group.yaml", "b/group.yaml", "inner"), root)
        assert {each.found().files["inner"].path for each in (settings, *settings.by_task())} == {root / "a/inner.yaml"}

    def test_a_group_covers_its_members(self, root):
        write_task(root / "tasks/both.yaml", {"group": "both", "task": ["pets", "answers"]})
        before = tasks_digest(EvalSettings(("both",), root))
        write_task(root / "tasks/answers.yaml", {**ANSWERS, "doc_to_text": "Q: {{question}}"})
        assert tasks_digest(EvalSettings(("both",), root)) != before


def test_score_table():
    def score(task, value, stderr=None, higher=True):
        return Score(task, "acc,none", value, stderr, higher, 10)

    table = score_table(
        {"base": [score("a", 0.5, 0.021), score("b", 4.0, higher=False)], "lewis": [score("a", 0.75, 0.02)], "odd": []}
    )
    assert table == [
        {"model": "base", "a/acc,none ↑": "0.5 ± 0.021", "b/acc,none ↓": "4"},
        {"model": "lewis", "a/acc,none ↑": "0.75 ± 0.02 *", "b/acc,none ↓": "-"},
        {"model": "odd", "a/acc,none ↑": "-", "b/acc,none ↓": "-"},
    ]
