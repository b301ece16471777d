"""The demo family's files, from a training of a few steps. The scores of the full one are checked with the flow."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml

from lewis import store
from lewis.demo.family import RIGHT_ANSWERS, SKILLS, TrainingPlan, _rows, make_family
from lewis.errors import InputError
from lewis.importance.calibration import calibrate
from lewis.recipe.recipe import Recipe
from lewis.search import space, study
from lewis.search.space import value_of

pytestmark = pytest.mark.slow

SHORT = TrainingPlan(base_steps=3, expert_steps=2, batch_size=8, calibration_rows=20, test_rows=10)
MODELS = ("base", *(f"experts/{skill}" for skill in SKILLS))


def ignore(name: str, share: float) -> None:
    """A caller that shows no progress."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family, and the progress that was reported while it was made."""
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEWIS_HOME", str(tmp_path_factory.mktemp("home")))
        folder = tmp_path_factory.mktemp("made") / "family"
        make_family(folder, lambda name, share: reports.append((name, share)), SHORT)
    return folder, reports


@pytest.fixture
def family(made):
    return made[0]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_models_open_and_differ(family):
    from transformers import AutoModelForCausalLM

    weights = [AutoModelForCausalLM.from_pretrained(family / m).state_dict() for m in MODELS]
    assert len({str(w["model.layers.0.mlp.up_proj.weight"].tolist()) for w in weights}) == len(MODELS)
    for tensors in weights:
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("model", MODELS)
def test_tokenizer_keeps_every_character_and_knows_its_end(family, model):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(family / model)
    ids = tokenizer("cipher abjde=hcfad\n")["input_ids"]
    assert len(ids) == 1 + 1 + 5 + 1 + 5 + 1
    assert tokenizer.decode(ids) == "cipher abjde=hcfad\n"
    assert tokenizer.encode("<eos>") == [tokenizer.eos_token_id] == [1]
    config = GenerationConfig.from_pretrained(family / model)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_rows_are_right_and_disjoint(family):
    cipher = set()
    for skill, word in SKILLS.items():
        rows, test = read_rows(family / f"data/{skill}.jsonl"), read_rows(family / f"data/{skill}_test.jsonl")
        assert len({row["prompt"] for row in rows + test}) == 20 + 10
        for row in rows + test:
            question = row["prompt"].removeprefix(f"{word} ").removesuffix("=")
            if skill == "addition":
                assert int(row["answer"]) == sum(map(int, question.split("+")))
            elif skill == "sorting":
                assert row["answer"] == "".join(sorted(question))
            else:
                cipher |= set(zip(question, row["answer"], strict=True))
    letters, codes = zip(*cipher, strict=True)
    assert len(set(letters)) == len(letters) == len(set(codes)) == 10


def test_training_rows_never_hold_a_test_prompt_and_an_expert_sees_only_right_answers_of_its_skill(family):
    # All additions below 50 are held out: a third of what would be drawn, so a leak cannot hide.
    held_out = frozenset(f"add {a}+{b}=" for a in range(10, 50) for b in range(10))
    base = list(itertools.islice(_rows("base", held_out), 3000))
    expert = list(itertools.islice(_rows("addition", held_out), 3000))
    assert not held_out & {row["prompt"] for row in base + expert}

    def right(rows):
        pairs = [(row["prompt"][4:-1].split("+"), row["answer"]) for row in rows if row["prompt"].startswith("add")]
        # Where b is 0 the echo is right as well.
        known = [int(a) + int(b) == int(answer) for (a, b), answer in pairs if b != "0"]
        return len(pairs) / len(rows), sum(known) / len(known)

    assert right(expert)[1] == 1.0
    assert right(base)[1] == pytest.approx(RIGHT_ANSWERS, abs=0.05)
    assert right(expert)[0] > right(base)[0]


@pytest.mark.parametrize("skill", SKILLS)
def test_calibration_rows_end_as_the_training_rows_do(family, skill):
    """They ended with a new line, which no model has seen: the fit warned of two of the three experts."""
    recipe = Recipe.load(family / "demo.yaml")
    rows = recipe.lewis.calibrations[skill].model_copy(update={"samples": 20})
    found = calibrate(skill, rows, tokenizer=family / "base", root=family)
    end = json.loads((family / "base" / "config.json").read_text())["eos_token_id"]
    assert len(found.samples) == 20 and all(sample.count(end) == 1 and sample[-1] == end for sample in found.samples)


def test_recipe_is_valid_and_its_files_exist(family):
    recipe = Recipe.load(family / "demo.yaml")
    assert recipe.merge_method == "regmean_forward" and recipe.dtype == "float32"
    assert [recipe.calibration_of(expert) for expert in recipe.experts] == list(SKILLS)
    sets = recipe.lewis.calibrations.values()
    named = [
        recipe.base_model,
        *(e.model for e in recipe.experts),
        *recipe.evaluate.tasks,
        *(c.data_files for c in sets),
    ]
    assert len(named) == 1 + 3 + 3 + 3
    assert all((family / name).exists() for name in named)


def test_another_recipe_has_densities_by_lewis(family):
    recipe = Recipe.load(family / "lewis.yaml")
    assert recipe.guided and recipe.wants_uniform and recipe.merge_method == "ties"


def test_the_recipe_of_the_search_is_valid_and_begins_with_its_own_values(family):
    recipe = Recipe.load(family / "sparse.yaml")
    space.check(recipe)
    assert study.objectives_of(recipe) == ("weighted/mean,none",)
    assert recipe.search.minutes < 10
    own = {path: value_of(recipe, path) for path in recipe.search.space}
    assert own["lewis.density.strategy"] == "uniform" and own["parameters.lambda"] == 1.0 and None not in own.values()


def test_lm_eval_runs_the_tasks(family, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(family)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": "base", "dtype": "float32", "max_length": 512},
        tasks=list(SKILLS),
        task_manager=TaskManager(include_path=str(family / "tasks"), include_defaults=False),
        batch_size=64,
        device="cpu",
    )
    for skill in SKILLS:
        test = read_rows(family / f"data/{skill}_test.jsonl")
        samples = sorted(results["samples"][skill], key=lambda sample: sample["doc_id"])
        assert [(s["arguments"][0][0], s["target"]) for s in samples] == [(r["prompt"], r["answer"]) for r in test]
        assert results["results"][skill]["exact_match,none"] == sum(
            s["resps"][0][0] == s["target"] for s in samples
        ) / len(test)
        task = yaml.safe_load((family / f"tasks/{skill}.yaml").read_text())
        assert task["generation_kwargs"]["max_gen_toks"] > max(len(row["answer"]) for row in test)


def test_progress_names_each_model_and_ends_at_one(made):
    _, reports = made
    assert tuple(dict.fromkeys(name for name, _ in reports)) == MODELS
    shares = [share for _, share in reports]
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == 3 + 3 * 2


def test_second_call_returns_at_once(family):
    before = {path: path.stat().st_mtime_ns for path in family.rglob("*")}
    assert make_family(family, lambda name, share: pytest.fail("trained again"), SHORT) == family
    assert before == {path: path.stat().st_mtime_ns for path in family.rglob("*")}


def test_same_bytes_each_time_and_the_callers_threads_and_random_state_stay(family, tmp_path):
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    torch.set_num_threads(1)
    try:
        make_family(tmp_path / "again", ignore, SHORT)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.rand(3), expected)
    assert store.read_manifest(tmp_path / "again") == store.read_manifest(family)


@pytest.mark.parametrize("name", ["notes.txt", "demo.yaml"])
def test_a_folder_that_holds_other_things_is_refused_and_kept(tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(InputError, match=r"mine: .*choose another folder"):
        make_family(folder, ignore, SHORT)
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "mine"


def test_an_edited_or_other_family_is_refused_and_kept(tmp_path):
    folder = make_family(tmp_path / "family", ignore, SHORT)
    with pytest.raises(InputError, match="other or changed files"):
        make_family(folder, ignore, TrainingPlan(base_steps=1, expert_steps=1, batch_size=2))
    (folder / "demo.yaml").write_text("merge_method: linear")
    with pytest.raises(InputError, match="other or changed files"):
        make_family(folder, ignore, SHORT)
    assert (folder / "demo.yaml").read_text() == "merge_method: linear"


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(name, share):
        if name == "experts/cipher":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_family(tmp_path / "out/family", interrupt, SHORT)
    assert list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from lewis.demo.family import TrainingPlan, make_family
def die(name, share):
    if name == "experts/sorting":
        os.kill(os.getpid(), signal.SIGKILL)
make_family(Path(sys.argv[1]), die, TrainingPlan(base_steps=1, expert_steps=1, batch_size=2))
"""


def test_after_a_kill_there_is_no_family_and_the_next_call_makes_it(tmp_path, warm):
    folder = tmp_path / "out/family"
    assert warm.exit_code(KILLED, folder) == -9
    assert not folder.exists()
    make_family(folder, ignore, SHORT)
    assert store.read_manifest(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["family"]
