"""The READMEs name every allocator, every kind of evidence and every argument of the decorator."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from lewis import allocation, recipe
from lewis.allocators import ALLOCATORS, Needs, allocator

GUIDE = (Path(allocation.__file__).parent / "README.md").read_text()
OWN = {name: row for name, row in ALLOCATORS.items() if not row.origin}


def table(text: str, head: str) -> dict[str, list[str]]:
    """What a row's first cell quotes -> its cells, of the table that begins with `head`."""
    rows = text.partition(f"| {head}")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {row[0].split("`")[1].partition("=")[0]: row for row in cells}


STRATEGIES = table((Path(recipe.__file__).parent / "README.md").read_text(), "`strategy` | density")


def test_every_allocator_has_a_row() -> None:
    assert STRATEGIES.keys() == OWN.keys()


@pytest.mark.parametrize("name", OWN)
def test_a_row_says_whether_the_allocator_needs_calibration_and_names_its_paper(name: str) -> None:
    _, what, calibration = STRATEGIES[name]
    assert calibration == ("no" if OWN[name].evidence == "nothing" else "yes")
    assert OWN[name].paper in what


def test_every_kind_of_evidence_and_every_argument_has_a_row() -> None:
    assert table(GUIDE, "`evidence` | number").keys() == set(get_args(Needs))
    assert table(GUIDE, "argument | meaning").keys() == inspect.signature(allocator).parameters.keys() - {
        "name",
        "paper",
    }
