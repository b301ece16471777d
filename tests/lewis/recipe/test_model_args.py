"""`evaluate.model_args`: what each backend may be told, and what is said of the rest."""

import inspect
import re
from typing import Any

import pytest

from lewis.recipe.model_args import ALLOWED
from lewis.recipe.recipe import Recipe
from tests.lewis.recipe.test_readme import README
from tests.support.models import parse

MERGE = {"merge_method": "linear", "models": [{"model": "org/a"}, {"model": "org/b"}]}


def read(**evaluate: Any) -> Recipe:
    return parse({**MERGE, "evaluate": {"tasks": ["x"], **evaluate}})


def test_what_is_allowed_is_read_as_it_is_written() -> None:
    given = {"gpu_memory_utilization": 0.9, "max_model_len": 4096, "enforce_eager": False, "trust_remote_code": True}
    block = read(backend="vllm", gpus=2, allow_code_execution=True, model_args=given).evaluate
    assert block and block.model_args == given and (block.backend, block.gpus) == ("vllm", 2) and block.runs_model_code
    plain = read(model_args={}).evaluate
    assert plain and (plain.backend, plain.gpus, plain.runs_model_code) == ("hf", 1, False)


@pytest.mark.parametrize("backend", ALLOWED)
def test_the_readme_lists_the_arguments(backend: str) -> None:
    table = README.partition("takes these arguments, and no others:")[2]
    [row] = re.findall(rf"^\| `{backend}` \|(.*)\|$", table, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == ALLOWED[backend].keys()


def test_the_arguments_are_those_of_lm_evals_classes() -> None:
    """Of the classes that can be loaded here; `chat` chooses between two classes, and the rest go to transformers."""
    from lm_eval.models.api_models import TemplateAPI
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion

    hf = inspect.signature(HFLM.__init__).parameters
    assert ALLOWED["hf"].keys() - hf.keys() == {"attn_implementation"}
    client = {*inspect.signature(TemplateAPI.__init__).parameters, *inspect.signature(LocalChatCompletion).parameters}
    assert ALLOWED["openai"].keys() - client == {"chat"}
