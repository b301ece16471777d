"""Config files of lm-eval as the `evaluate` of a recipe: what is taken over, and what is refused with what to do."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import RecipeError
from lewis.recipe.lm_eval_config import _KEYS
from lewis.recipe.recipe import Recipe

MERGE = {"merge_method": "ties", "base_model": "org/base", "models": [{"model": "org/math"}]}


def recipe(folder: Path, evaluate: Any, **content: Any) -> Recipe:
    (folder / "lm_eval.yaml").write_text(yaml.safe_dump(content))
    return Recipe.parse(yaml.safe_dump({**MERGE, "evaluate": evaluate}), root=folder)


def test_what_lm_eval_reads_is_what_is_scored(tmp_path: Path) -> None:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    content = {
        "model": "vllm",
        "model_args": "pretrained=a/b,revision=main,dtype=bfloat16,tensor_parallel_size=2,gpu_memory_utilization=0.8",
        "tasks": ["gsm8k,arc_easy", "tasks/own.yaml"],
        "num_fewshot": 3,
        "batch_size": "auto",
        "limit": 0.5,
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "device": "cuda:1",
        "output_path": "out",
        "log_samples": True,
        "wandb_args": "project=x",
        "seed": [0, 1234, 1234, 1234],
        "gen_kwargs": {},
        "system_instruction": None,
    }
    found = recipe(tmp_path, "lm_eval.yaml", **content).evaluate
    theirs = EvaluatorConfig.from_config(tmp_path / "lm_eval.yaml")
    assert found is not None and found.backend == theirs.model and found.gpus == 2
    assert found.tasks == ("gsm8k", "arc_easy", "tasks/own.yaml")
    for key in ("num_fewshot", "batch_size", "limit", "apply_chat_template"):
        assert getattr(found, key) == getattr(theirs, key)
    assert found.model_args == {key: theirs.model_args[key] for key in ("dtype", "gpu_memory_utilization")}
    assert {field.name for field in fields(EvaluatorConfig)} - {"config"} == set(_KEYS)


def test_the_recipe_counts_before_the_file(tmp_path: Path) -> None:
    block = {"config": "./lm_eval.yaml", "limit": 8, "weights": {"b": 1.0}, "allow_code_execution": True}
    found = recipe(tmp_path, block, tasks="a, b", limit=3, confirm_run_unsafe_code=True, model="huggingface").evaluate
    assert found is not None and (found.tasks, found.limit, found.backend) == (("a", "b"), 8, "hf")
    chat = recipe(
        tmp_path, "lm_eval.yaml", tasks="a", model="local-chat-completions", apply_chat_template=True
    ).evaluate
    assert chat is not None and (chat.backend, chat.model_args) == ("openai", {"chat": True})
    assert recipe(tmp_path, "lm_eval.yaml", tasks="a", batch_size="auto:4").evaluate.batch_size == "auto"  # type: ignore[union-attr]
    code = recipe(tmp_path, {**block, "tasks": ["c"]}, trust_remote_code=True).evaluate
    assert code is not None and (code.tasks, code.runs_model_code) == (("c",), True)


@pytest.mark.parametrize(
    "content, told",
    [
        ({"taks": "a"}, r"taks: lm-eval has no such key.*tasks"),
        ({"gen_kwargs": {"temperature": 1}}, "gen_kwargs: a recipe does not take it; write `generation_kwargs`"),
        ({"system_instruction": "Be kind."}, "system_instruction: a recipe does not take it"),
        ({"samples": {"a": [1]}}, "samples: a recipe does not take it; use `limit`"),
        ({"model": "anthropic"}, "model: expected hf, .* got 'anthropic'"),
        ({"model_args": "dtype"}, "model_args: expected a mapping, or a text such as dtype=float16, got 'dtype'"),
        ({"model_args": [1]}, "model_args: expected a mapping"),
        ({"model_args": {"peft": "x"}}, r"evaluate.model_args.peft: .*it follows from the model"),
        ({"confirm_run_unsafe_code": True}, "confirm_run_unsafe_code: it runs code; if you trust it, say `allow_code"),
        ({"trust_remote_code": True}, "trust_remote_code: it runs code"),
        ({"seed": 42}, r"seed: expected lm-eval's own \[0, 1234, 1234, 1234\], got 42"),
        ({"fewshot_as_multiturn": False, "apply_chat_template": True}, "fewshot_as_multiturn: expected true"),
        ({"include_path": "/elsewhere"}, "include_path: expected . or tasks, got '/elsewhere'"),
        ({"tasks": []}, r"tasks: expected names and paths, as a list or with commas, got \[\]"),
        ({"apply_chat_template": "mine"}, "evaluate.apply_chat_template: .*got 'mine'"),
        ({"batch_size": "auto4"}, "evaluate.batch_size"),
        ({"model": ["hf"]}, r"model: expected hf, .* got \['hf'\]"),
        (
            {"tasks": "a,mmlu_*"},
            r"tasks: expected names and paths, got the pattern 'mmlu_\*'; name each task, or a group",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_an_error(content: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(tmp_path, "lm_eval.yaml", **{"tasks": "a", **content})


@pytest.mark.parametrize(
    "given, told",
    [
        ("missing.yaml", r"evaluate.config: .*missing.yaml"),
        ("/etc/hostname", "expected the path of a file in the recipe's folder"),
        ({"config": ["lm_eval.yaml"]}, "expected the path of a file"),
        ("list.yaml", r"list.yaml: expected a mapping, got list"),
        ("a\0b", "evaluate.config"),
    ],
)
def test_a_file_that_is_none_of_the_recipes_folder(given: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[a]")
    with pytest.raises(RecipeError, match=told):
        recipe(tmp_path, given, tasks="a")
