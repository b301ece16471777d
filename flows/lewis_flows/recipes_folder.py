"""The recipes that the service keeps up to date: every YAML file at the top of one folder.

The folder is the one that `LEWIS_RECIPES` names. If that is not set, it is `deployments/recipes` in a checkout of the
project, and `recipes` in the store (`LEWIS_HOME`) where the package was installed from a wheel.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from lewis import settings, store
from lewis.errors import InputError, LewisError, nearest
from lewis.input_files import check_regular, read_bytes
from lewis.recipe import yaml_text
from lewis.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"
"""Folder with `prefect.yaml` and `recipes/`: a link to `deployments/` in a checkout, a folder in an installed wheel."""

EXAMPLE = "example.yaml.txt"  # ends so that it is not taken for a recipe
Signature = tuple[str, int, int, int, int]  # of a file
_KEYS = ("name", "team", "group")  # of `register`
# Of a recipe: it becomes a name in Prefect, whose templates must not find `{{ }}` in it.
_NAME = re.compile(r"[^\W_][\w .+@-]*")


def location() -> Path:
    """Return the absolute path of the folder of recipes, which need not exist: see the top of this module."""
    if given := settings.RECIPES.get():
        return given
    return SHIPPED.resolve() / "recipes" if SHIPPED.is_symlink() else store.home() / "recipes"


def folder() -> Path:
    """Return the folder of recipes, once it is known to exist.

    Raises:
        InputError: if it does not exist.
    """
    path = location()
    if not path.is_dir():
        fix = "set LEWIS_RECIPES to the folder of your recipes"
        raise InputError(
            f"{path}: LEWIS_RECIPES names no folder; {fix}"
            if settings.RECIPES.given()
            else f"{path}: no such folder; `lewis up` and `lewis deploy` make it, or {fix}"
        )
    return path


def make() -> None:
    """Create the folder of recipes in the store, if the recipes belong there and it is missing.

    It gets an example of a recipe, which is not taken for one, and the evaluation tasks that come with the project. A
    folder that `LEWIS_RECIPES` names is not made, so that a wrong path is an error.
    """
    path = location()
    if settings.RECIPES.given() or path.exists():
        return
    with store.lock("recipes"):
        if path.exists():
            return
        scratch = store.beside(path)
        shutil.copytree(SHIPPED / "recipes" / "tasks", scratch / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(SHIPPED / "recipes" / EXAMPLE, scratch)
        scratch.rename(path)


def holds(path: Path) -> bool:
    """Whether a file lies at the top of the folder."""
    return path.parent.resolve() == location().resolve()


def names() -> list[str]:
    """The names of the recipes, sorted; a recipe has the name of its file without the ending."""
    return sorted({path.stem for path in _files()})


def is_there(recipe: str) -> bool:
    """Whether a recipe is still in the folder; also True for a path, or if the folder cannot be read."""
    try:
        return "/" in recipe or recipe in names()
    except LewisError:
        return True


def version(content: bytes) -> str:
    """Identity of a file's content, 12 hex digits: the version of its deployment."""
    return hashlib.sha256(content).hexdigest()[:12]


def signature() -> list[Signature]:
    """Return the signature of each recipe's file, as `signed`.

    Raises:
        InputError: if the folder cannot be read.
    """
    return signed(_yaml_files())


def signed(paths: Iterable[Path]) -> list[Signature]:
    """Return name, inode, size and times (ns) of each file, which differ once one is added, edited or removed.

    They differ also after a change of a file's mode, by which it can be read, or not any more.
    """
    found = []
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):  # it was removed
            known = path.stat()
            found.append((path.name, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns))
    return sorted(found)


def find(recipe: str, *, paths: bool = True) -> Path:
    """The file of a recipe.

    Args:
        recipe: its name in the folder, or a path.
        paths: whether a path is accepted. It is from the command line, where the user can read that file anyway; it is
            not from Prefect's API, an event or a webhook, whose senders must not choose what this machine reads.

    Raises:
        InputError: if there is none, or two files of the folder have the name.
    """
    files = _files() if recipe.strip(".") and "/" not in recipe else []
    of_name = [path for path in files if path.stem == recipe]
    if len(of_name) > 1:
        both = " and ".join(path.name for path in of_name)
        raise InputError(f"recipe: both {both} in {folder()}; rename one of them")
    if of_name:
        return of_name[0]
    known = [path.stem for path in files]
    if not paths:
        raise InputError(
            f"recipe: {recipe!r} is not the name of a recipe in {folder()}; a run of a deployment takes only such names"
            f"{nearest(recipe, known)}; put the file there, or run it by its path with `lewis run`"
        )
    try:
        path = Path(recipe).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise InputError(f"{recipe}: no such file: {error}") from error
    check_regular(path)
    if not path.is_file():
        raise InputError(f"{recipe}: no recipe of this name in {folder()} and no such file{nearest(recipe, known)}")
    return path.absolute()


def check_deployment(deployment: str, recipe: str) -> None:
    """Check that a deployment with the name of a recipe runs that recipe, whose turn and page it takes.

    Raises:
        InputError: if it runs another one.
    """
    if deployment and deployment != recipe and deployment in names():
        raise InputError(f"recipe: the deployment {deployment!r} runs {deployment!r}, got {recipe!r}; start {recipe!r}")


def name_of(recipe: str) -> str:
    """The name of a recipe that is given by name or by path; the path of a file outside the folder stays as it is."""
    path = Path(recipe)
    return path.stem if path.suffix in (".yaml", ".yml") and holds(path) else recipe


def load(recipe: str) -> Recipe:
    """Read and check a recipe, as `find`, `Recipe.load` and `check_alone`."""
    path = find(recipe)
    found = Recipe.load(path)
    check_alone(path, found)
    return found


def registered_name(recipe: str) -> str:
    """Return the name of the model that a recipe registers, even if the file is wrong elsewhere; empty if none."""
    try:
        return _registers(find(recipe))[0]
    except LewisError:
        return ""


def check_alone(path: Path, recipe: Recipe) -> None:
    """Check that no other recipe of the folder registers the same model, unless both name one `register.group`.

    Nor may another recipe have the same keys in Prefect: both are refused, so that a new file cannot take the place of
    one that was there. A file of the same name elsewhere is the same recipe: its versions and runs have that name.

    Args:
        path: the recipe's file, in the folder or elsewhere.
        recipe: what was read from it.

    Raises:
        InputError: naming the other recipe.
    """
    from lewis_tasks.support.caching import slug  # completion, which needs this module, does not wait for Prefect

    if not location().is_dir():
        return
    block = recipe.register_as
    for other, (name, group) in _all_registers(location(), tuple(signature())).items():
        if other.stem != path.stem and slug(other.stem) == slug(path.stem):
            raise InputError(
                f"{path.name}: its artifacts and secrets would be those of {other.name}, whose name differs in case or "
                "signs alone; neither of them runs until one is renamed"
            )
        same = block is not None and name == block.model and (group != block.group or not group)
        if same and other.stem != path.stem:
            raise InputError(
                f"register.name: {name!r} is registered by {path.name} and by {other.name}, which would replace each "
                "other's champion; give one of them another name or `register.team`, or both the same `register.group` "
                "if that is meant"
            )


@lru_cache(maxsize=1)
def _all_registers(_folder: Path, _signature: tuple[Signature, ...]) -> dict[Path, tuple[str, str]]:
    """Return, for each recipe file, the result of `_registers`; the files are read again when one has changed."""
    return {path: _registers(path) for path in sorted(_files())}


def _registers(path: Path) -> tuple[str, str]:
    """Name in MLflow and group of the model that a recipe registers; each empty if the file does not say it."""
    try:
        text = read_bytes(path, yaml_text.MAX_BYTES).decode(errors="replace")
    except (LewisError, OSError):
        return "", ""
    try:
        content = yaml_text.load(text, path.stem)
        block = content.get("register") if isinstance(content, dict) else None
        found = [block.get(key) if isinstance(block, dict) else None for key in _KEYS]
    except LewisError:  # not even YAML: look for the lines
        lines = re.search(r"^register:(.*(?:\n[ \t].*)*)", text, re.MULTILINE)
        keys = [rf"\b{key}:[ \t]*[\"']?([^\s,}}\"'#]+)" for key in _KEYS]
        matches = [re.search(key, lines[1]) if lines else None for key in keys]
        found = [match[1] if match else None for match in matches]
    name, team, group = (each if isinstance(each, str) else "" for each in found)
    return f"{team}.{name}" if team and name else name, group


def load_for_deployment(path: Path, overrides: Sequence[str]) -> Recipe:
    """Read a recipe whose overrides come from Prefect's API, an event or a webhook.

    Raises:
        InputError: if the recipe is wrong, or the overrides change which code runs, or where the result goes.
    """
    recipe = Recipe.load(path, overrides)
    if not overrides:
        return recipe
    written = Recipe.load(path)
    code = recipe.evaluate if recipe.evaluate and recipe.evaluate.allow_code_execution else None
    allowed = written.evaluate
    if code and not (allowed and allowed.allow_code_execution and set(code.tasks) <= set(allowed.tasks)):
        changed = "evaluate.allow_code_execution, or the tasks of a recipe that says it"
    elif code and code.runs_model_code and not (allowed and allowed.runs_model_code):
        changed = "evaluate.model_args.trust_remote_code"
    elif recipe.publish and recipe.publish != written.publish:
        changed = "publish"
    elif recipe.serve != written.serve:
        changed = "serve"
    else:
        return recipe
    raise InputError(
        f"overrides: a run of a deployment cannot change {changed}; write it into {path}, or use `lewis run --set`"
    )


def load_all() -> dict[str, Recipe]:
    """Load all recipes, by name. One that is wrong is logged and left out: it does not stop the others."""
    found = {}
    for path in _yaml_files():
        if not _NAME.fullmatch(path.stem):
            told = "expected a name of letters, digits, spaces and . _ + @ - that begins with a letter or digit"
            logger.warning("recipe %a is left out: %s; rename the file", path.name, told)
    for name in names():
        try:
            found[name] = load(name)
        except InputError as error:
            logger.warning("recipe %s is left out: %s", name, error)
        except Exception as error:  # of any kind, such as of a package's merge method
            logger.warning("recipe %s is left out: %s: %s", name, type(error).__name__, error, exc_info=error)
    return found


def _files() -> list[Path]:
    return [path for path in _yaml_files() if _NAME.fullmatch(path.stem)]


def _yaml_files() -> list[Path]:
    try:
        return [path for path in folder().iterdir() if path.suffix in (".yaml", ".yml") and path.is_file()]
    except OSError as error:
        raise InputError(f"{error.filename}: LEWIS_RECIPES: cannot be read: {error.strerror}") from error
