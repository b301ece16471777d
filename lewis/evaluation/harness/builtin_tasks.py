"""Find lm-eval's own tasks, and their YAML files.

lm-eval reads all of its 14,000 files before it can say where a task is, and an included file again for each of 12,500
includes. Here an included file is read once, which saves half of the eight seconds. The index is kept in the store, for
as long as none of these files changes. An evaluation gets only the files of its tasks.
"""

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lewis import private_names, store
from lewis.errors import InputError
from lewis.evaluation.harness.task_files import blocks, members, read_task
from lewis.store import sealed_json


class Builtin(NamedTuple):
    """An entry of lm-eval's index.

    Attributes:
        kind: `TASK`, `PY_TASK`, `GROUP` or `TAG`.
        path: its YAML file; None for a tag.
        tags: of a tag, the tasks that have it.
    """

    kind: str
    path: str | None
    tags: Sequence[str]


@functools.cache
def index() -> Mapping[str, Builtin]:
    """All tasks, groups and tags of lm-eval, by name."""
    kept, state = store.home() / "lm-eval-tasks.json", _state()
    with suppress(OSError, sealed_json.DamagedError):  # absent, or damaged
        found = sealed_json.read(kept)
        if found["state"] == state:
            return {name: Builtin(*entry) for name, entry in found["tasks"].items()}
    with private_names.LM_EVAL_LOAD.replaced(_read_once(private_names.LM_EVAL_LOAD.get())):
        from lm_eval.tasks import TaskManager

        entries = TaskManager().task_index.items()
    tasks = {
        name: Builtin(entry.kind.name, str(entry.yaml_path) if entry.yaml_path else None, sorted(entry.tags))
        for name, entry in entries
    }
    if store.home().is_dir():
        with suppress(OSError):  # a store that cannot be written to
            store.write_text(kept, sealed_json.dumps({"state": state, "tasks": tasks}))
    return tasks


def _read_once(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap lm-eval's `load_yaml` to read each file once, and return copies, since lm-eval changes what it gets."""
    once = functools.cache(functools.partial(load, resolve_func=False))
    return lambda path, **_: dict(once(path))


def _state() -> str:
    """Identity of all of lm-eval's task files: its version, and the size and time of each."""
    found = []
    spec = find_spec("lm_eval")  # does not import it
    for folder in (spec and spec.submodule_search_locations) or ():
        for path, _, names in os.walk(Path(folder) / "tasks"):
            for name in names:
                if not name.endswith((".py", ".pyc")):
                    stat = os.stat(os.path.join(path, name))
                    found.append((path, name, stat.st_size, stat.st_mtime_ns))
    return store.digest([version("lm_eval"), sorted(found)])


def builtin_task(name: str) -> tuple[Mapping[str, Any], list[Any] | None]:
    """The config of a task or group of lm-eval, empty if unknown, and the members of a group or tag; None for a task.

    Raises:
        InputError: if its file cannot be read.
    """
    entry = index().get(name)
    if entry is None:
        return {}, None
    config = read_task(Path(entry.path)).config if entry.path else {}
    return config, {"GROUP": members(config), "TAG": list(entry.tags)}.get(entry.kind)


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


def files(names: Iterable[str]) -> list[Path]:
    """The YAML files of tasks, groups and tags of lm-eval, and of all their members.

    Raises:
        InputError: if one cannot be read.
    """
    return [Path(entry.path) for entry, _ in _all_in(names) if entry.path]


def _all_in(names: Iterable[str]) -> Iterator[tuple[Builtin, Mapping[str, Any]]]:
    """Entry and config of each of lm-eval's tasks, groups and tags that is named, and of all their members."""
    pending = list(dict.fromkeys(names))
    for name in pending:
        if entry := index().get(name):
            config, inside = builtin_task(name)
            yield entry, config
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
