"""A package that registers something for LEWIS, put on sys.path as pip would."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lewis.plugins import Table

Install = Callable[..., None]


@contextmanager
def installing(
    table: Table[Any], folder: Path, monkeypatch: pytest.MonkeyPatch, *, module: str, entry: str
) -> Iterator[Install]:
    """Gives a function that puts a package's module and dist-info into `folder`; at the end the table is as before.

    Args:
        table: whose group of entry points the package names.
        module, entry: of the package, unless the function is given others.
    """
    before, loaded = table.copy(), table.loaded
    named = {"module": module, "entry": entry}
    monkeypatch.syspath_prepend(str(folder))

    def install(source: str, *, version: str = "1.2", **other: str) -> None:
        given = named | other
        (folder / f"{given['module']}.py").write_text(source)
        info = folder / f"{given['module']}-{version}.dist-info"
        info.mkdir()
        name = given["module"].replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{table.group}]\n{given['entry']}\n")
        table.loaded = False

    yield install
    table.clear()
    table.update(before)
    table.loaded = loaded
    for name, found in list(sys.modules.items()):
        if str(getattr(found, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
