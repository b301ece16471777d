"""Models that cannot be scored as the recipe says are refused before any work; a plan says so too."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import InputError
from lewis.evaluation import step
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.models.source import ModelFiles, pin_all
from lewis.recipe.recipe import Recipe
from lewis.steps.plan import make_plan
from lewis.steps.run import check_scored
from tests.conftest import Family
from tests.support.models import edit_json, parse

CHATS = {"tasks": ["arc_easy"], "apply_chat_template": True, "baselines": []}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def chatty(family: Family, tmp_path: Path) -> Path:
    """An expert with a chat template."""
    folder = shutil.copytree(family.math, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture
def bare(family: Family, tmp_path: Path) -> Path:
    """An expert without tokenizer files, which a merge takes: it has the base's vocabulary."""
    return shutil.copytree(family.math, tmp_path / "bare", ignore=lambda *_: TOKENIZER)


def recipe_of(base: Path | None, *experts: Path, **blocks: Any) -> Recipe:
    models = [{"model": str(expert)} for expert in experts]
    of_base = {"base_model": str(base)} if base else {}
    return parse({"merge_method": "ties" if base else "linear", **of_base, "models": models} | blocks)


def check(recipe: Recipe) -> None:
    check_scored(recipe, *pin_all(recipe))


@pytest.mark.long
def test_a_base_without_a_chat_template_that_the_gate_compares_with(family: Family, chatty: Path) -> None:
    """Most pretrained bases have none: the scores failed after the merge, in transformers."""
    gate = {"register": {"name": "x", "gate": {"metric": "arc_easy/acc,none"}}, "chat_template": "chatml"}
    with pytest.raises(InputError, match=rf"{family.base}: expected a chat template, since evaluate.apply_chat_temp"):
        make_plan(recipe_of(family.base, chatty, evaluate=CHATS, **gate))
    check(recipe_of(family.base, chatty, evaluate={**CHATS, "apply_chat_template": False}, **gate))


def test_the_merged_model_has_the_template_of_its_tokenizer_or_the_recipes(family: Family, chatty: Path) -> None:
    with pytest.raises(InputError, match=r"merged: expected a chat template.*set `chat_template` in the recipe"):
        check(recipe_of(family.base, chatty, evaluate=CHATS))
    check(recipe_of(family.base, chatty, evaluate=CHATS, chat_template="chatml"))
    check(recipe_of(family.base, chatty, evaluate=CHATS, tokenizer_source=str(chatty)))
    check(recipe_of(None, chatty, family.code, evaluate=CHATS))


@pytest.mark.slow
def test_an_expert_without_a_tokenizer(family: Family, bare: Path) -> None:
    tasks = {"tasks": ["arc_easy"]}
    with pytest.raises(InputError, match=rf"{bare}: expected a tokenizer.*copy those of its base"):
        make_plan(recipe_of(family.base, bare, family.code, evaluate=tasks))
    check(recipe_of(family.base, bare, family.code, evaluate={**tasks, "baselines": ["base"]}))  # it is not scored
    check(recipe_of(family.base, bare, family.code))


def test_a_model_that_was_not_checked_before_is_refused_when_it_is_scored(
    family: Family, bare: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step.lm_eval, "evaluate", lambda *_, **__: pytest.fail("scored"))
    settings = EvalSettings(("arc_easy",), family.base)
    with pytest.raises(InputError, match="champion: expected a tokenizer"):
        step.score_task(ModelFiles.at("champion", "bare", bare), settings)
    with pytest.raises(InputError, match="champion: expected a chat template"):
        chats = replace(settings, apply_chat_template=True)
        step.score_task(ModelFiles.at("champion", "math", family.math), chats)


@pytest.mark.slow
def test_code_of_a_model_that_is_not_where_the_evaluation_would_run_it(family: Family, tmp_path: Path) -> None:
    """It was found out after the merge, in transformers."""
    base = shutil.copytree(family.base, tmp_path / "own")
    edit_json(base / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModel": "org/other--far.Model"})
    runs = {"allow_code_execution": True, "model_args": {"trust_remote_code": True}}
    tasks = {"tasks": ["arc_easy"], "baselines": ["base"], **runs}
    adapter = {"output": {"kind": "lora", "rank": 2}}
    with pytest.raises(InputError, match=rf"{base}: .*trust_remote_code.* expected own.py in its folder"):
        make_plan(recipe_of(base, family.math, evaluate=tasks, **adapter))
    (base / "own.py").write_text("")
    check(recipe_of(base, family.math, evaluate=tasks, **adapter))
    with pytest.raises(InputError, match=r"merged: .* copies none into a merged model"):
        check(recipe_of(base, family.math, evaluate=tasks))
    check(recipe_of(family.base, family.math, evaluate=tasks))  # no config names code
