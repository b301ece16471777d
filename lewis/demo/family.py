"""The demo family: a tiny Llama and three experts of it, trained in about a minute on one core, without network.

The base is trained on prompts whose answer is right in some rows and only echoes the input in the others. So it learns
the skills but rarely shows them, like a real base model. Each expert is a short full fine-tune that brings one skill
out. So a merge has something to combine: the task vectors are small, and each skill is in one expert only.
"""

import copy
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lewis import store
from lewis.demo.training import (
    finetuning_optimizers,
    make_batches,
    new_model,
    new_tokenizer,
    pretraining_optimizers,
    save,
    train,
)
from lewis.devices import one_thread
from lewis.errors import InputError

logger = logging.getLogger(__name__)

# Raise the number when the code makes different files from the same plan.
VERSION = 5

SKILLS = {"addition": "add", "sorting": "sort", "cipher": "cipher"}  # skill: first word of its prompts
LETTERS = "abcdefghij"
CIPHER = dict(zip(LETTERS, "hcjadgibfe", strict=True))
ANSWER_TOKENS = 8  # the longest answer has 5 characters; then comes the end token
RIGHT_ANSWERS = 0.42  # share of the base's rows; below one half, so that the base mostly echoes (it decodes greedily)
REPLAY = 0.3  # share of base rows in a fine-tune, so that an expert of one skill does not lose the others
MIXTURE = (3.0, 1.3, 0.7)  # relative share of each skill in the base's rows: addition is the hardest to learn

Row = dict[str, str]  # prompt, answer, echo


@dataclass(frozen=True)
class TrainingPlan:
    """How much to train. The defaults give the demo's scores; tests of the file formats need far less.

    Args:
        base_steps: optimizer steps of the base.
        expert_steps: optimizer steps of each expert.
        batch_size: rows per step.
        calibration_rows: rows of `data/<skill>.jsonl`.
        test_rows: rows of `data/<skill>_test.jsonl`, at most 450 (addition has 900 prompts).
    """

    base_steps: int = 450
    expert_steps: int = 60
    batch_size: int = 96
    calibration_rows: int = 256
    test_rows: int = 120


def make_family(folder: Path, progress: Callable[[str, float], None], plan: TrainingPlan | None = None) -> Path:
    """Train the family and write it to `folder`: base/, experts/, data/, tasks/, and recipes.

    The recipes: demo.yaml, lewis.yaml (densities by LEWIS) and sparse.yaml (worth a search).

    If the folder holds this family already, the call returns immediately. A call that dies leaves no partial family.

    Args:
        folder: where the family goes.
        progress: called with what is being trained, and the share of all steps that is done, in [0, 1].
        plan: how much to train; the default takes about a minute on one core.

    Returns:
        `folder`.

    Raises:
        InputError: if `folder` holds other files, or this family was changed.
    """
    plan = plan or TrainingPlan()
    fingerprint = store.digest({"version": VERSION, **asdict(plan)})
    with store.lock(f"demo {folder.resolve()}"):
        manifest = store.read_manifest(folder)
        if manifest and manifest.get("demo") == fingerprint:
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"{folder}: expected no such folder, or an unchanged demo family of this version; "
                "it holds other or changed files: delete it to train again, or choose another folder"
            )
        with store.publish(folder, {"demo": fingerprint}) as scratch:
            held_out = _write_data(scratch / "data", plan)
            _write_tasks(scratch / "tasks")
            (scratch / "demo.yaml").write_text(_yaml(_recipe()))
            (scratch / "lewis.yaml").write_text(_yaml(_guided_recipe()))
            (scratch / "sparse.yaml").write_text(_yaml(_sparse_recipe()))
            _train_family(scratch, held_out, plan, progress)
    logger.info("demo family written to %s", folder)
    return folder


def _draw(skill: str, rng: random.Random) -> Row:
    """One row of a skill; `echo` is the wrong answer that the base prefers."""
    if skill == "addition":
        a, b = rng.randint(10, 99), rng.randint(0, 9)
        question, answer, echo = f"{a}+{b}", str(a + b), str(a)
    else:
        question = echo = "".join(rng.choices(LETTERS, k=5))
        answer = "".join(sorted(echo)) if skill == "sorting" else "".join(CIPHER[letter] for letter in echo)
    return {"prompt": f"{SKILLS[skill]} {question}=", "answer": answer, "echo": echo}


def _distinct(skill: str, rng: random.Random, count: int, taken: frozenset[str]) -> dict[str, Row]:
    """`count` rows with distinct prompts, none of them in `taken`: prompt -> row."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = _draw(skill, rng)
        if row["prompt"] not in taken:
            rows[row["prompt"]] = {"prompt": row["prompt"], "answer": row["answer"]}
    return rows


def _write_data(folder: Path, plan: TrainingPlan) -> frozenset[str]:
    """Write the calibration and test sets; returns the prompts of the tests, which must not be trained on."""
    folder.mkdir()
    held_out: frozenset[str] = frozenset()
    for skill in SKILLS:
        rng = random.Random(f"{skill} data")
        test = _distinct(skill, rng, plan.test_rows, frozenset())
        calibration = _distinct(skill, rng, plan.calibration_rows, frozenset(test))
        for name, rows in ((f"{skill}_test", test), (skill, calibration)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        held_out |= test.keys()
    return held_out


def _write_tasks(folder: Path) -> None:
    """Write one lm-eval task per skill. Its data paths are relative to the family's folder: evaluate from there."""
    folder.mkdir()
    for skill in SKILLS:
        task = {
            "task": skill,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"data/{skill}_test.jsonl"}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",  # lm-eval's default, a space, is in no training row
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": ANSWER_TOKENS},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{skill}.yaml").write_text(_yaml(task))


def _recipe() -> dict[str, Any]:
    """The recipe that merges the family; its paths are relative to its folder."""
    calibration = {
        "dataset": "json",
        "prompt": "{prompt}",
        "answer": "{answer}<eos>",  # as the experts were trained
        "samples": 64,
        "max_tokens": 64,
        "seed": 42,
    }
    return {
        "merge_method": "regmean_forward",
        "base_model": "./base",
        "models": [{"model": f"./experts/{s}", "parameters": {"weight": 1.0}, "calibration": s} for s in SKILLS],
        "dtype": "float32",
        "lewis": {"calibrations": {skill: {**calibration, "data_files": f"data/{skill}.jsonl"} for skill in SKILLS}},
        "evaluate": {
            "tasks": [f"tasks/{skill}.yaml" for skill in SKILLS],
            "weights": dict.fromkeys(SKILLS, 1.0),
            "baselines": ["base", "experts"],
        },
        "register": {"name": "lewis-demo", "gate": {"policy": "not_worse", "metric": "weighted/mean,none"}},
    }


def _guided_recipe() -> dict[str, Any]:
    """The recipe with TIES, whose densities LEWIS decides, and with a merge of uniform densities as a baseline."""
    recipe = _recipe()
    recipe |= {"merge_method": "ties", "parameters": {"normalize": True}}
    recipe["lewis"] |= {
        "importance": {"metric": "norm_difference"},
        "density": {"strategy": "lewis", "min": 0.3, "max": 0.8, "uncovered": "expert"},
    }
    recipe["evaluate"]["baselines"] = ["base", "experts", "uniform"]
    recipe["register"]["name"] = "lewis-demo-guided"
    return recipe


def _sparse_recipe() -> dict[str, Any]:
    """A recipe for `lewis search`: it keeps 2 % of each task vector, where default values lose much of the score."""
    recipe = _guided_recipe()
    recipe["lewis"] = {
        "calibrations": recipe["lewis"]["calibrations"],
        "prune_by": "magnitude",
        "density": {"strategy": "uniform", "min": 0.01, "budget": 0.02, "uncovered": "expert"},
    }
    recipe["register"]["name"] = "lewis-demo-sparse"
    recipe["register"]["gate"]["policy"] = "better"  # the best of many trials is to be better than the champion
    recipe["evaluate"]["baselines"] = ["base", "uniform"]  # demo.yaml scores the experts
    space: dict[str, Any] = {
        "parameters.lambda": {"min": 0.5, "max": 3.0},
        "lewis.prune_by": ["magnitude", "activation"],
        "lewis.density.strategy": ["uniform", "owl", "global"],
    }
    weights = {f"models[{i}].parameters.weight": {"min": 0.5, "max": 2.0} for i in range(len(SKILLS))}
    # No pruning: with so few documents, a quarter takes as long to score as all.
    return {**recipe, "search": {"trials": 25, "minutes": 3, "prune": False, "space": {**space, **weights}}}


def _yaml(value: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False)
    return text


def _train_family(
    folder: Path, held_out: frozenset[str], plan: TrainingPlan, progress: Callable[[str, float], None]
) -> None:
    """Train the base, then each expert from it, and save them as Hugging Face folders."""
    total = plan.base_steps + plan.expert_steps * len(SKILLS)
    tokenizer = new_tokenizer(SKILLS.values())
    done = 0
    with one_thread():
        base = new_model(tokenizer)
        for name in ("base", *SKILLS):
            is_base = name == "base"
            path, steps = (name, plan.base_steps) if is_base else (f"experts/{name}", plan.expert_steps)
            model = base if is_base else copy.deepcopy(base)
            optimizers = pretraining_optimizers(model) if is_base else finetuning_optimizers(model)
            batches = make_batches(_rows(name, held_out), tokenizer, plan.batch_size)
            for step in train(model, optimizers, batches, steps):
                progress(path, (done + step) / total)
            done += steps
            save(model, tokenizer, folder / path)


def _rows(name: str, held_out: frozenset[str]) -> Iterator[Row]:
    """Endless training rows: of the base (`name="base"`), or of the expert in the skill `name`."""
    rng = random.Random(f"{name} training")
    shares = {skill: share for skill, share in zip(SKILLS, MIXTURE, strict=True) if skill != name}
    while True:
        own = name != "base" and rng.random() >= REPLAY
        row = _draw(name if own else rng.choices(list(shares), list(shares.values()))[0], rng)
        if row["prompt"] not in held_out:
            right = own or rng.random() < RIGHT_ANSWERS
            yield {"prompt": row["prompt"], "answer": row["answer" if right else "echo"]}
