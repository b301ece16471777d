"""Merge methods of other packages: the entry point group `lewis.methods`.

A package registers one by naming it in its own `pyproject.toml`:

    [project.entry-points."lewis.methods"]
    my_method = "my_package.my_module"      # which holds @merge_method("my_method", ...)
"""

import functools
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from lewis.errors import InputError
from lewis.methods.registry import METHODS, Method

GROUP = "lewis.methods"


@functools.cache
def load_plugins() -> None:
    """Import what the installed packages register, once.

    Raises:
        InputError: naming the package whose method cannot be loaded: its import fails, it registers nothing under the
            entry point's name, or its name is taken.
    """
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        _load(point)


def find(name: str) -> Method:
    """The method of that name; the methods of other packages are loaded first if it is not known yet.

    Raises:
        InputError: if there is none, or a package's methods cannot be loaded.
    """
    if name not in METHODS:
        load_plugins()
    if name not in METHODS:
        raise InputError(f"merge_method: there is no method {name!r}; install the package that brings it")
    return METHODS[name]


def _load(point: EntryPoint) -> None:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    told = f"{package}: its entry point {point.name} = {point.value!r} of the group {GROUP}"
    try:
        point.load()
    except (Exception, SystemExit) as error:  # whatever another package's import raises
        raise InputError(
            f"{told} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall the package"
        ) from error
    method = METHODS.get(point.name)
    if method is None:
        raise InputError(f"{told} registers no merge method of that name; name the entry point as the method")
    home = method.function.__module__
    if home.partition(".")[0] != point.module.partition(".")[0]:
        raise InputError(f"{told} takes a name that there is already, in {home}; rename its method")
    METHODS[point.name] = replace(method, origin=package, in_mergekit=False)
