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

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation import step
from lewis.evaluation.harness import process
from lewis.evaluation.harness.lm_eval import EvalSettings, evaluate, tasks_digest
from lewis.evaluation.harness.process import LM_EVAL
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
            tasks_digest(settings)
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
