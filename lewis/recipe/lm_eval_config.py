"""A config file of lm-eval (`lm_eval run --config FILE`) in the place of a recipe's `evaluate` block."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError, RecipeError, nearest
from lewis.input_files import read_text
from lewis.recipe import yaml_text

BACKENDS = {
    **{name: "hf" for name in ("hf", "huggingface", "hf-auto")},
    **{name: name for name in ("vllm", "sglang")},
    **{name: "openai" for name in ("local-completions", "local-chat-completions")},
}
"""lm-eval's name of a model class -> the name of the backend in a recipe."""
_OF_THE_MODEL = (
    *("pretrained", "revision", "subfolder", "tokenizer", "model", "base_url"),
    *("tokenizer_backend", "tokenized_requests"),
)
_GPUS = ("tensor_parallel_size", "tp_size")
_SAME = ("num_fewshot", "limit", "batch_size", "apply_chat_template")
_WITHOUT_EFFECT = (  # on the scores
    *("device", "output_path", "log_samples", "show_config", "write_out", "verbosity", "check_integrity"),
    *("use_cache", "cache_requests", "wandb_args", "wandb_config_args", "hf_hub_log_args", "trackio_args"),
)
_REFUSED = {  # key that would change the scores -> what to do instead
    "gen_kwargs": "write `generation_kwargs` into the task's file",
    "system_instruction": "write it into the task's `description`",
    "samples": "use `limit`, or `documents` in the recipe",
    "predict_only": "a recipe needs scores; remove it",
    "metadata": "write it into the task's file",
}
_SEEDS = (None, [0, 1234, 1234, 1234], [0, 1234, 1234])
_KEYS = (
    *("tasks", "model", "model_args", "max_batch_size", "include_path", "seed", "fewshot_as_multiturn"),
    *("confirm_run_unsafe_code", "trust_remote_code", *_SAME, *_WITHOUT_EFFECT, *_REFUSED),
)


def file_of(data: Mapping[str, Any], root: Path) -> Path | None:
    """Return the config file that the raw YAML of a recipe in the folder `root` names; None if it names none."""
    block = data.get("evaluate")
    name = block.get("config") if isinstance(block, dict) else block
    return root / name if isinstance(name, str) else None


def with_config(data: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return a recipe's data with the lm-eval config file that `evaluate` names replaced by the file's content.

    `evaluate` is the path, or a block whose key `config` is the path; the block's other keys override the file's.

    Args:
        data: the raw YAML of the recipe.
        root: the recipe's folder, in which the file must be.

    Raises:
        RecipeError: naming the file, and the key that a recipe cannot take over.
    """
    block = data.get("evaluate")
    block = {"config": block} if isinstance(block, str) else block
    if not isinstance(block, dict) or "config" not in block:
        return dict(data)
    name, own = block["config"], {key: value for key, value in block.items() if key != "config"}
    try:
        path = (root / str(name)).resolve()
        if not isinstance(name, str) or not path.is_relative_to(root.resolve()):
            raise InputError(f"expected the path of a file in the recipe's folder {root}, got {name!r}")
        content = yaml_text.load(read_text(path, yaml_text.MAX_BYTES), name)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"evaluate.config: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"evaluate.config: {name}: expected a mapping, got {type(content).__name__}")
    found = _block({key: value for key, value in content.items() if value is not None}, name, own)
    return {**data, "evaluate": {**found, **own}}


def _block(content: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    def wrong(key: str, what: str) -> RecipeError:
        return RecipeError(f"evaluate.config: {name}: {key}: {what}")

    _check(content, own, wrong)
    arguments, gpus = _model_args(content, wrong)
    backend = BACKENDS[content.get("model", "hf")]
    found = {key: content[key] for key in _SAME if key in content}
    if str(found.get("batch_size")).startswith("auto:"):  # the number says how often lm-eval searches for the size
        found["batch_size"] = "auto"
    found |= {"tasks": _tasks(content.get("tasks"), wrong)} if "tasks" not in own else {}
    found |= {"backend": backend} if backend != "hf" else {}
    return found | ({"model_args": arguments} if arguments else {}) | ({"gpus": gpus[0]} if gpus else {})


def _check(content: Mapping[str, Any], own: Mapping[str, Any], wrong: Any) -> None:
    """Refuse keys of the file that a recipe cannot take over."""
    for key in content:
        if key not in _KEYS:
            raise wrong(str(key), f"lm-eval has no such key{nearest(str(key), _KEYS)}")
        if key in _REFUSED and content[key]:
            raise wrong(key, f"a recipe does not take it; {_REFUSED[key]}")
    if (model := content.get("model", "hf")) not in list(BACKENDS):  # the given value may be unhashable
        raise wrong("model", f"expected {', '.join(BACKENDS)}, got {model!r}; other models are not of a recipe")
    for key in ("trust_remote_code", "confirm_run_unsafe_code"):
        if content.get(key) and own.get("allow_code_execution") is not True:
            raise wrong(key, "it runs code; if you trust it, say `allow_code_execution: true` in the block `evaluate`")
    if content.get("seed") not in _SEEDS:
        raise wrong("seed", f"expected lm-eval's own {_SEEDS[1]}, got {content['seed']!r}; remove it")
    if content.get("fewshot_as_multiturn") is False and content.get("apply_chat_template"):
        raise wrong("fewshot_as_multiturn", "expected true, as lm-eval has it for chats; remove it")
    if (include := content.get("include_path")) and str(Path(str(include))) not in (".", "tasks"):
        raise wrong("include_path", f"expected . or tasks, got {include!r}; name the tasks by the paths of their files")


def _model_args(content: Mapping[str, Any], wrong: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return the block's `model_args`, and the number of GPUs as a list, which is empty if the file gives none."""
    arguments = _arguments(content.get("model_args") or {}, wrong)
    gpus = [arguments.pop(key) for key in _GPUS if key in arguments]
    arguments = {key: value for key, value in arguments.items() if key not in _OF_THE_MODEL}
    if content.get("model") == "local-chat-completions":
        arguments["chat"] = True
    if content.get("max_batch_size"):
        arguments["max_batch_size"] = content["max_batch_size"]
    if content.get("trust_remote_code"):
        arguments["trust_remote_code"] = True
    return arguments, gpus


def _tasks(given: Any, wrong: Any) -> list[str]:
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed or not all(isinstance(each, str) for each in listed):
        raise wrong("tasks", f"expected names and paths, as a list or with commas, got {given!r}")
    names = [task.strip() for each in listed for task in each.split(",") if task.strip()]
    if patterns := [name for name in names if set(name) & set("*?[")]:
        raise wrong("tasks", f"expected names and paths, got the pattern {patterns[0]!r}; name each task, or a group")
    return names


def _arguments(given: Any, wrong: Any) -> dict[str, Any]:
    """Return `model_args` as a mapping; of a text such as `a=1,b=x`, each value is read as YAML."""
    if not isinstance(given, str):
        if not isinstance(given, dict):
            raise wrong("model_args", f"expected a mapping, or a text such as dtype=float16, got {given!r}")
        return dict(given)
    pairs = [each.partition("=") for each in given.split(",") if each.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise wrong("model_args", f"expected a mapping, or a text such as dtype=float16, got {given!r}")
    return {key.strip(): yaml_text.load(value, "model_args") for key, _, value in pairs}
