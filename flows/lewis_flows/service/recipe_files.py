"""The files in the folder of recipes, and why a recipe whose file is right cannot run."""

import logging
from dataclasses import dataclass, replace
from itertools import takewhile

from lewis.errors import InputError, LewisError
from lewis.input_files import read_bytes
from lewis.models.hub.pin import find_folder
from lewis.recipe import yaml_text
from lewis.recipe.block import parts_of
from lewis.recipe.recipe import Recipe
from lewis_flows import evaluation_files, recipes_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeFile:
    """A file in the folder of recipes, and the recipe that was read from it.

    Attributes:
        name: of the recipe.
        version: identity of the file's content, 12 hex digits.
        comment: the comment that the file begins with.
        recipe: what was read from the file; None if that is wrong.
        why: why the recipe cannot run; empty if it can.
    """

    name: str
    version: str
    comment: str
    recipe: Recipe | None
    why: str


class Folder:
    """The folder of recipes; it is read, and what is wrong logged, once a file changed or a wrong recipe was mended."""

    def __init__(self) -> None:
        self._seen: object = None
        self._files: list[RecipeFile] = []
        self._logged: dict[str, str] = {}

    def files(self) -> list[RecipeFile]:
        """Return the files of all recipes, sorted by name; the reason why a recipe cannot run is logged once.

        Raises:
            InputError: if the folder cannot be read.
        """
        if (now := recipes_folder.signature()) != self._seen or any(map(_is_mended, self._files)):
            recipes = recipes_folder.load_all()
            read = (_read_file(name, recipes.get(name)) for name in recipes_folder.names())
            self._files, self._seen = [each for each in read if each], now
        # What a recipe names may come and go while no file of the recipes' folder changes.
        found = [replace(each, why=_why(each.recipe)) if each.recipe else each for each in self._files]
        reasons = {each.name: each.why for each in found if each.recipe and each.why}  # `load_all` logs the others
        for name, why in reasons.items():
            if self._logged.get(name) != why:
                logger.warning("%s cannot run: %s", name, why)
        self._logged = reasons
        return found


def _read_file(name: str, recipe: Recipe | None) -> RecipeFile | None:
    try:
        content = read_bytes(recipes_folder.find(name), yaml_text.MAX_BYTES)
    except (LewisError, OSError):
        if not recipes_folder.is_there(name):  # it was removed just now
            return None
        content, recipe = b"", None
    why = "" if recipe else "it is wrong: `lewis status` says where"
    first = takewhile(lambda line: line.startswith("#"), content.decode(errors="replace").splitlines())
    comment = "\n".join(line.lstrip("#").strip() for line in first).strip()
    return RecipeFile(name, recipes_folder.version(content), comment, recipe, why)


def _is_mended(file: RecipeFile) -> bool:
    """Whether a recipe that was wrong can be loaded now, such as after an edit of the lm-eval config that it names."""
    if file.recipe:
        return False
    try:
        recipes_folder.load(file.name)
    except Exception:  # as `recipes_folder.load_all`
        return False
    return True


def _why(recipe: Recipe) -> str:
    """Say why a recipe whose file is right cannot run: it names a folder or a file that is missing or wrong."""
    if missing := missing_folder(recipe):
        return missing
    try:
        evaluation_files.check(recipe)
    except Exception as error:  # as `recipes_folder.load_all`
        return str(error)
    return ""


def missing_folder(recipe: Recipe) -> str | None:
    """Return the error of a recipe's first model that can only be a folder and does not exist; None if all exist."""
    for ref in [recipe.base_model, *(entry.model for entry in recipe.models)]:
        for part in parts_of(ref, recipe.root) if ref else ():
            try:
                find_folder(part, recipe.root)
            except InputError as error:
                return str(error)
    return None
