"""What lm-eval can say of a task whose documents are on another machine, which are not downloaded to ask it.

Its config, metrics, filters and settings of the generation are real; two documents stand in for the rows, and constants
for what is made from them: prompts, targets and choices.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lewis import private_names

_GONE = ("process_docs", "dataset_kwargs", "use_prompt", "description", "gen_prefix", "should_decontaminate")
_MADE = ("doc_to_text", "doc_to_target", "doc_to_choice")


def elsewhere(block: Mapping[str, Any], root: Path) -> bool:
    """Whether a mapping of a task file names documents of the Hub or another machine.

    Args:
        block: the config of a task, or a mapping inside it.
        root: the recipe's folder, in which relative paths start.
    """
    source, options = str(block.get("dataset_path") or ""), block.get("dataset_kwargs")
    patterns = texts(options.get("data_files")) if isinstance(options, Mapping) else []
    return ("/" in source and not (root / source).exists()) or any("://" in pattern for pattern in patterns)


def texts(value: Any) -> list[str]:
    """The strings in a value such as `data_files`: a string, a list of strings, or a mapping of splits to either."""
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in texts(item)]
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


@contextmanager
def standing_in(without_rows: Callable[[Mapping[str, Any]], bool]) -> Iterator[set[str]]:
    """In the block, let lm-eval load tasks without their rows.

    Args:
        without_rows: says of a task's config whether its rows are elsewhere.

    Yields:
        The names of the tasks that were loaded so, which grow.
    """
    found = set[str]()
    build = private_names.LM_EVAL_TASK.get()

    def init(self: Any, *arguments: Any, config: dict[str, Any] | None = None, **options: Any) -> None:
        if config is not None and without_rows(config):
            config = _stand_in(config)
            found.add(str(config.get("task")))
        build(self, *arguments, config=config, **options)

    with private_names.LM_EVAL_TASK.replaced(init):
        yield found


def _stand_in(config: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"doc_to_text": "q", "doc_to_target": "a", "doc_to_choice": ["a", "b"]}
    if config.get("doc_to_choice") is not None:
        made["doc_to_target"] = 0
    given = {key: value for key, value in config.items() if key not in _GONE}
    given |= {key: made[key] for key in _MADE if config.get(key) is not None or config.get("use_prompt") is not None}
    own = config.get("fewshot_config")
    if isinstance(own, dict):
        given["fewshot_config"] = {key: value for key, value in own.items() if key == "sampler"}
    splits = {key: "rows" for key in ("test_split", "validation_split") if config.get(key) is not None}
    return given | splits | {"training_split": None, "fewshot_split": None, "num_fewshot": 0, "custom_dataset": _rows}


def _rows(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"rows": Dataset.from_dict({"row": ["one", "two"]})}
