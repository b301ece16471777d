"""The tasks that come with lm-eval, and their YAML files: an evaluation gets only the files of its tasks."""

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lewis.errors import InputError
from lewis.evaluation.harness.task_files import blocks, members, read_task
from lewis.rehearsal.answers import answers
from lewis.rehearsal.lm_eval_itself import INDEX


class Builtin(NamedTuple):
    """An entry of lm-eval's index.

    Attributes:
        kind: `TASK`, `PY_TASK`, `GROUP` or `TAG`.
        path: its YAML file, from lm-eval's package; empty for a tag.
        tags: of a tag, the tasks that have it.
    """

    kind: str
    path: str
    tags: list[str]


@functools.cache
def index() -> Mapping[str, Builtin]:
    """All tasks, groups and tags of lm-eval, by name."""
    [found] = answers([INDEX])
    return {name: Builtin(*entry) for name, entry in found.items()}


def package() -> Path:
    """The folder of lm-eval's package, which is not imported for that."""
    spec = find_spec("lm_eval")
    assert spec and spec.origin, "lm-eval is not installed"
    return Path(spec.origin).parent


def check_builtin(names: Iterable[str], local: Iterable[str]) -> None:
    """Check that lm-eval has these tasks, and that none of them runs generated code.

    Raises:
        InputError: with the nearest names, of lm-eval's and the `local` ones.
    """
    for name in names:
        if name not in index():
            near = difflib.get_close_matches(name, [*local, *index()], n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise InputError(
                f"evaluate.tasks: expected a YAML file or a task of lm-eval, got {name!r}, which is neither; {hint}"
            )
        if any(block.get("unsafe_code") for _, config in _all_in([name]) for block in blocks(config)):
            raise InputError(
                f"evaluate.tasks: {name} of lm-eval runs code that the model writes, on the bare machine; "
                "use a task file that runs it in lewis.evaluation.sandbox, "
                "as deployments/recipes/tasks/mbpp_generate.yaml does"
            )


def files(names: Iterable[str]) -> list[str]:
    """The YAML files of tasks, groups and tags of lm-eval, and of all their members, from lm-eval's package.

    Raises:
        InputError: if one cannot be read.
    """
    return [entry.path for entry, _ in _all_in(names) if entry.path]


def _all_in(names: Iterable[str]) -> Iterator[tuple[Builtin, Mapping[str, Any]]]:
    """Entry and config of each of lm-eval's tasks, groups and tags that is named, and of all their members."""
    pending = list(dict.fromkeys(names))
    for name in pending:
        if entry := index().get(name):
            config = read_task(package() / entry.path).config if entry.path else {}
            yield entry, config
            inside = {"GROUP": members(config), "TAG": entry.tags}.get(entry.kind)
            pending += [each for each in dict.fromkeys(_named(inside)) if each not in pending]


def _named(inside: Any) -> Iterator[str]:
    """All names among the members of a group that may be names of tasks or groups."""
    if isinstance(inside, str):
        yield inside
    elif isinstance(inside, Mapping):
        yield from _named([inside.get("task"), inside.get("group")])
    elif isinstance(inside, list):
        for each in inside:
            yield from _named(each)
