"""Check the files that a recipe's `evaluate` names by a path, cheaply enough for a look every few seconds."""

from collections.abc import Iterator
from pathlib import Path

from lewis.evaluation.harness.task_files import data_files, read_task
from lewis.recipe import lm_eval_config, yaml_text
from lewis.recipe.recipe import Recipe
from lewis_flows.recipes_folder import Signature, signed

# Folder and name of a recipe -> its text, and the files that `check` found well with it.
_sound: dict[tuple[Path, str], tuple[str, list[Path], list[Signature]]] = {}


def check(recipe: Recipe) -> None:
    """Check lm-eval's config, the task files and their data, if `evaluate` names them by a path.

    They are read only if one of them has changed since they were found well. A task that is given by its name is not
    looked for, which takes seconds: a run does that.

    Raises:
        InputError: if one is missing or wrong.
    """
    text, paths, before = _sound.get((recipe.root, recipe.name), ("", [], []))
    if text != recipe.text or signed(paths) != before:
        paths = list(_read(recipe))
        _sound[recipe.root, recipe.name] = recipe.text, paths, signed(paths)


def _read(recipe: Recipe) -> Iterator[Path]:
    """Read the files, and yield their paths."""
    if config := lm_eval_config.file_of(yaml_text.read(recipe.text, recipe.name), recipe.root):
        yield config
        recipe = Recipe.parse(recipe.text, root=recipe.root, name=recipe.name)
    for name in recipe.evaluate.tasks if recipe.evaluate else ():
        if name.endswith((".yaml", ".yml")):
            task = read_task(recipe.root / name)
            yield from (*task.sources, *data_files(task, recipe.root))
