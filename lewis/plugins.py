"""Tables of functions that recipes refer to by name; other packages extend them through entry points.

LEWIS registers its own functions by a decorator. Another package does so in a module that its `pyproject.toml` names:

    [project.entry-points."lewis.methods"]
    my_method = "my_package.my_module"      # which holds @merge_method("my_method", ...)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from lewis.errors import InputError, LewisError


@dataclass(frozen=True)
class Row:
    """One function of a table.

    Attributes:
        noun: the word for such a function in errors.
        name: its name in a recipe.
        function: the function.
        paper: URL of the paper that describes it.
        origin: the package that brought it and its version; empty for LEWIS's own.
    """

    noun: ClassVar[str]
    name: str
    function: Callable[..., Any]
    paper: str
    origin: str = field(default="", kw_only=True)

    @contextmanager
    def blamed(self, where: str) -> Iterator[None]:
        """Add to errors of a block, which runs this function, where it failed and whose code it is.

        Args:
            where: what the function worked on: the name of a tensor or of an expert, or a path in the recipe.

        Raises:
            InputError: instead of a ValueError of a function that comes with LEWIS: its parameters do not fit.
            LewisError: instead of any other exception of another package's function, an exit of the process included.
        """
        try:
            yield
        except (LewisError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            if self.origin:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                whose = f"{self.noun} {self.name} of {self.origin}"
                raise LewisError(f"{where}: {whose} failed: {reason}; repair or uninstall the package") from error
            if isinstance(error, ValueError):
                raise InputError(f"{where}: {error}") from error
            raise


R = TypeVar("R", bound=Row)


class Table(dict[str, R], Generic[R]):
    """Name -> row: LEWIS's own rows, and after `load` those of the installed packages.

    Attributes:
        group: the group of entry points.
        loaded: whether the rows of the installed packages are in it.
    """

    def __init__(self, group: str, row: type[R]) -> None:
        super().__init__()
        self.group, self.loaded, self._noun = group, False, row.noun

    def add(self, row: R) -> None:
        """Add a row.

        Raises:
            ValueError: if another function has its name.
        """
        own, other = row.function, self.get(row.name)
        if other and _place(other.function) != _place(own):
            raise ValueError(f"the {self._noun} {row.name!r} exists already, in {other.function.__module__}")
        self[row.name] = row

    def load(self) -> None:
        """Add the rows that installed packages register, by importing their modules, once.

        Raises:
            InputError: naming the package whose row cannot be loaded: its import fails, it registers nothing under the
                entry point's name, or its name is taken.
        """
        if self.loaded:
            return
        for point in sorted(entry_points(group=self.group), key=lambda point: (point.name, point.value)):
            self._load(point)
        self.loaded = True

    def find(self, name: str) -> R:
        """Return the row with a name; the rows of other packages are loaded first if the name is not known yet.

        Raises:
            InputError: if there is no such row, or a package's rows cannot be loaded.
        """
        if name not in self:
            self.load()
        if name not in self:
            raise InputError(f"there is no {self._noun} {name!r}; install the package that brings it")
        return self[name]

    def _load(self, point: EntryPoint) -> None:
        try:
            version = point.dist.version if point.dist else None
        except KeyError:  # raised by importlib_metadata's packages; importlib.metadata's return None instead
            version = None
        package = f"{point.dist.name} {version}" if point.dist else "an unknown package"
        which = f"{package}: its entry point {point.name} = {point.value!r} of the group {self.group}"
        if not version:  # a change of the package would not change digests
            raise InputError(f"{which} is of a package without a version, which digests need; install it with pip")
        try:
            point.load()
        except (Exception, SystemExit) as error:  # whatever another package's import raises
            raise InputError(
                f"{which} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall the package"
            ) from error
        row = self.get(point.name)
        if row is None:
            raise InputError(
                f"{which} registers no {self._noun} of that name; name the entry point as the {self._noun}"
            )
        own = point.module.partition(".")[0]
        home = row.function.__module__
        if home.partition(".")[0] != own:
            raise InputError(f"{which} takes a name that there is already, in {home}; rename its {self._noun}")
        for name, each in self.items():  # its module may register more rows than the one that the entry point names
            if name == point.name or (not each.origin and each.function.__module__.partition(".")[0] == own):
                self[name] = replace(each, origin=package)


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
