"""Find, read and check the lm-eval tasks that a recipe names, before a model is loaded.

A name is looked up in the recipe's folder first; one that is not found there has to be one of lm-eval's own tasks
(`lewis.evaluation.harness.builtin_tasks`).
"""

import ast
import glob
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lewis.errors import InputError
from lewis.input_files import read_bytes
from lewis.recipe.yaml_text import MAX_BYTES, LimitedLoader, load
from lewis.rehearsal.no_rows import elsewhere, texts
from lewis.syntax import syntax_tree


@dataclass(frozen=True)
class TaskFile:
    """One YAML file of a task or a group.

    Attributes:
        name: the value of its key `group` or `task`.
        config: its content, merged with the files that it includes; a `!function` tag is kept as text.
        sources: the YAML file, the files that it includes, the Python files that define its functions, next to it or
            in an installed package, and the files that these import from their own folder.
        functions: the values of its `!function` tags, as `module.function`.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    sources: tuple[Path, ...]
    functions: tuple[str, ...] = ()

    @property
    def tags(self) -> list[str]:
        """The tags of a task; lm-eval gives a group none."""
        return [] if "group" in self.config else texts(self.config.get("tag"))


@dataclass(frozen=True)
class FoundTasks:
    """Where the tasks of a list are defined.

    Attributes:
        names: of the tasks and groups to ask lm-eval for.
        files: name -> the file that defines it, for these names and the members of groups.
        builtin: names and members that no file defines, so lm-eval must know them.
        local: all names that files in the recipe's folder define, whether asked for or not.
        tags: those of these names and members that are a tag of files in the recipe's folder -> the tasks that have it.
    """

    names: tuple[str, ...]
    files: Mapping[str, TaskFile]
    builtin: tuple[str, ...]
    local: tuple[str, ...]
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def find_tasks(tasks: Iterable[str], root: Path, among: Iterable[str] = ()) -> FoundTasks:
    """Sort tasks into those that YAML files in the recipe's folder define and those that lm-eval has to know.

    Args:
        tasks: paths of YAML files relative to `root`, and names of tasks or groups.
        root: the recipe's folder; a name is looked up next to the named files, in `root/tasks` and in `root`.
        among: the tasks of the recipe, if `tasks` are some of them: names are looked up next to all named files, in
            the recipe's order.

    Raises:
        InputError: if a named file cannot be read, or two named files define the same task.
    """
    tasks = list(tasks)
    named = {item: read_task(root / item) for item in (*among, *tasks) if item.endswith((".yaml", ".yml"))}
    folders = dict.fromkeys(
        [*(task.path.parent for task in named.values()), (root / "tasks").resolve(), root.resolve()]
    )
    local = _read_folders(folders)
    defined: dict[str, TaskFile] = {}
    for task in named.values():
        if task.name in defined and defined[task.name].path != task.path:
            raise InputError(
                f"{task.path}: its task {task.name!r} is defined by {defined[task.name].path} as well; rename one"
            )
        defined[task.name] = task
    files: dict[str, TaskFile] = {}
    names = list(dict.fromkeys(named[item].name if item in named else item for item in tasks))
    builtin, pending, tags = [], list(names), dict[str, tuple[str, ...]]()
    for name in pending:
        if task_file := defined.get(name, local.get(name)):
            files[name] = task_file
            inside = _names(members(files[name].config)) if "group" in files[name].config else ()
            pending += [member for member in inside if member not in pending]
        elif tagged := sorted(each.name for each in {**local, **defined}.values() if name in each.tags):
            tags[name] = tuple(tagged)
            pending += [member for member in tagged if member not in pending]
        else:
            builtin.append(name)
    return FoundTasks(tuple(names), files, tuple(builtin), tuple(local), tags)


def read_task(path: Path) -> TaskFile:
    """Read an lm-eval YAML file without running any code.

    Raises:
        InputError: if the file, a file that it includes or a Python file of its functions is missing or broken.
    """
    sources: list[Path] = []
    functions: list[str] = []
    try:
        config = _read_yaml(path.resolve(), sources, functions)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise InputError(f"{path}: not a readable lm-eval task: {error}") from error
    name = config.get("group", config.get("task"))
    if not isinstance(name, str):
        keys = sorted(map(str, config))
        raise InputError(f"{path}: expected the key `task` (or `group`) with a name, got the keys {keys}")
    if any(not isinstance(block.get("dataset_kwargs") or {}, Mapping) for block in blocks(config)):
        raise InputError(f"{path}: dataset_kwargs: expected a mapping")
    return TaskFile(name, path.resolve(), config, tuple(sources), tuple(functions))


def data_files(task: TaskFile, root: Path) -> list[Path]:
    """The local files that a task reads its documents and prompts from, sorted.

    Relative paths start at `root`, where lm-eval runs.

    Raises:
        InputError: if one is missing or empty.
    """
    found: set[Path] = set()
    for block in blocks(task.config):
        source, options = str(block.get("dataset_path", "")), block.get("dataset_kwargs") or {}
        base = root / source if source and (root / source).is_dir() else root
        if base == root and "/" in source:
            continue  # a dataset on the Hub: its data_files are there
        base = base / str(options.get("data_dir") or "")
        for pattern in texts(options.get("data_files")) or (["**"] if base != root else []):
            if "://" in pattern:
                continue
            matches = [Path(match) for match in glob.glob(str(base / pattern), recursive=True)]
            matches = [match for match in matches if match.is_file() and match.stat().st_size]
            if not matches:
                raise InputError(
                    f"{task.path}: data file {pattern!r} is missing or empty in {base}; put or link it there"
                )
            found.update(matches)
    for prompts in (str(block.get("use_prompt") or "").partition(":")[0] for block in blocks(task.config)):
        if ".yaml" in prompts:  # so lm-eval knows a file
            if not (root / prompts).is_file():
                raise InputError(f"{task.path}: use_prompt: no file {root / prompts}; put or link it there")
            found.add(root / prompts)
    return sorted(found)


def reads_hub(found: FoundTasks, root: Path) -> bool:
    """Whether a task may read its documents from the Hub or another machine.

    True for lm-eval's own tasks, and for task files that name a repo on the Hub or a URL.
    """
    own = (block for task in found.files.values() for block in blocks(task.config))
    return bool(found.builtin) or any(elsewhere(block, root) for block in own)


def members(config: Mapping[str, Any]) -> list[Any]:
    """The items of a group's list `task`: names, and mappings that define a member or change it."""
    listed = config.get("task")
    return listed if isinstance(listed, list) else [listed] if isinstance(listed, str) else []


def _read_folders(folders: Iterable[Path]) -> dict[str, TaskFile]:
    """The tasks that files directly in these folders define; if several define one, the first folder wins."""
    tasks: dict[str, TaskFile] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.y*ml"))):
        with suppress(InputError):  # recipes are there too, and files that no recipe uses
            task = read_task(path)
            tasks.setdefault(task.name, task)
    return tasks


def _read_yaml(path: Path, sources: list[Path], functions: list[str]) -> dict[str, Any]:
    if path in sources:
        raise ValueError(f"{path} is included twice")
    sources.append(path)

    class Loader(LimitedLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        text = str(loader.construct_scalar(node))
        functions.append(text)
        module = text.rpartition(".")[0]
        file = path.parent / (module.replace(".", "/") + ".py")
        found = [file] if file.is_file() else _installed(module)
        if found is None:
            raise ValueError(f"!function {text}: no file {file}")
        for each in found:
            _with_imports(each, sources)
        return text

    Loader.add_constructor("!function", function)
    config = load(read_bytes(path, MAX_BYTES), str(path), Loader)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(config).__name__}")
    merged: dict[str, Any] = {}
    for included in texts(config.pop("include", None)):
        merged |= _read_yaml((path.parent / included).resolve(), sources, functions)
    return merged | config


def _installed(module: str) -> list[Path] | None:
    """The Python files of an installed module, found without importing it; empty if none; None without its package."""
    first, *inner = module.split(".")
    if not first or (spec := importlib.util.find_spec(first)) is None:
        return None
    files = [Path(spec.origin or "")] if not inner else list[Path]()
    for folder in (spec.submodule_search_locations or ()) if inner else ():
        place = Path(folder, *inner)
        files += [place.with_suffix(".py"), place / "__init__.py"]
    return [file for file in files if file.suffix == ".py" and file.is_file()]


def _with_imports(file: Path, sources: list[Path]) -> None:
    """Add a Python file to `sources`, and the files that it imports from its folder."""
    if file in sources:
        return
    sources.append(file)
    with suppress(SyntaxError, ValueError):  # lm-eval says so when it imports the file
        for node in ast.walk(syntax_tree(read_bytes(file, MAX_BYTES))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{name}" for name in names]
            for parts in (name.split(".") for name in names):
                places = [file.parent.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
                for each in (path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")):
                    if each.is_file():
                        _with_imports(each, sources)


def _names(listed: Iterable[Any]) -> Iterator[str]:
    """The names among a group's members; an unnamed task or group that is defined inside the list is skipped."""
    for item in listed:
        if isinstance(item, str):
            yield item
        elif not isinstance(item, Mapping) or not {"task", "group"} & item.keys():
            raise InputError(
                f"a group's list `task`: expected the name of a task, or a mapping with `task` or `group`, got {item!r}"
            )
        elif isinstance(item.get("task"), list):
            yield from _names(item["task"])
        elif "dataset_path" not in item and (name := item.get("task") or item.get("group")):
            yield str(name)


def blocks(config: Any) -> Iterator[Mapping[str, Any]]:
    """A config and every mapping inside it."""
    if isinstance(config, Mapping):
        yield config
    inner = config.values() if isinstance(config, Mapping) else config if isinstance(config, list) else ()
    for value in inner:
        yield from blocks(value)
