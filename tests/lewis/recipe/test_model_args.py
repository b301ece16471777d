"""`evaluate.model_args`: what each backend may be told, and what is said of the rest."""

import inspect
import re
from typing import Any

import pytest

from lewis.errors import RecipeError
from lewis.recipe.model_args import ALLOWED
from lewis.recipe.recipe import Recipe
from tests.lewis.recipe.test_readme import README
from tests.support.models import parse

MERGE = {"merge_method": "linear", "models": [{"model": "org/a"}, {"model": "org/b"}]}


def read(**evaluate: Any) -> Recipe:
    return parse({**MERGE, "evaluate": {"tasks": ["x"], **evaluate}})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"backend": "vlm"}, r"evaluate\.backend: expected 'hf', 'vllm', 'sglang' or 'openai', got 'vlm'"),
        ({"gpus": 0}, r"evaluate\.gpus: "),
        ({"model_args": {"dtyp": "auto"}}, r"model_args\.dtyp: the backend hf has no such argument.*dtype"),
        ({"model_args": {"max_model_len": 9}}, r"the backend hf has no such argument; vllm has"),
        ({"backend": "openai", "model_args": {"quantization": "fp8"}}, "argument; vllm and sglang have"),
        ({"model_args": {"dtype": "int8"}}, r"dtype: expected auto, float32, float16 or bfloat16, got 'int8'"),
        ({"model_args": {"dtype": None}}, r"dtype: expected auto, .* got None"),
        ({"model_args": {"max_length": True}}, "max_length: expected a whole number above 0, got True"),
        ({"model_args": {"max_memory_per_gpu": "much"}}, "expected a size such as 20GiB, got 'much'"),
        ({"model_args": {"chat_template_args": {"x": [1]}}}, "expected a mapping of names to texts, numbers"),
        ({"model_args": {"attn_implementation": "org/kernel"}}, "expected eager, .*got 'org/kernel'"),
        (
            {"backend": "vllm", "model_args": {"gpu_memory_utilization": 90}},
            "expected a number above 0, at most 1, got 90",
        ),
        ({"backend": "vllm", "model_args": {"quantization": "../x"}}, r"expected a name, got '\.\./x'"),
        (
            {"backend": "vllm", "model_args": {"tensor_parallel_size": 2}},
            r"not here: the number of GPUs is evaluate\.gpus",
        ),
        ({"model_args": {"parallelize": True}}, r"not here: the number of GPUs is evaluate\.gpus"),
        ({"model_args": {"pretrained": "org/x"}}, "not here: it follows from the model that is scored"),
        ({"backend": "openai", "model_args": {"base_url": "http://x"}}, "variable LEWIS_EVALUATION_SERVER"),
        ({"backend": "openai", "model_args": {"header": {}}}, "not here: a recipe holds no secrets"),
        ({"backend": "openai", "model_args": {"chat": True}}, "chat: .*say `apply_chat_template: true`"),
        ({"model_args": {"trust_remote_code": True}}, "trust_remote_code: .*say `allow_code_execution: true`"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        read(**given)


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
