"""The methods' README names every method and parameter, and says of each method what it needs and takes."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from lewis import methods
from lewis.methods import METHODS

README = (Path(methods.__file__).parent / "README.md").read_text()
OWN = sorted(name for name, method in METHODS.items() if method.function.__module__.startswith("lewis.methods."))


def table(title: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two rows."""
    lines = README.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def quoted(cell: str) -> list[str]:
    return cell.split("`")[1::2]


METHOD_ROWS = {quoted(row[0])[0]: row for row in table("The methods")}
PARAMETER_ROWS = table("Parameters")


def test_every_method_has_a_row() -> None:
    assert sorted(METHOD_ROWS) == OWN


@pytest.mark.parametrize("name", OWN)
def test_a_row_says_what_the_method_needs_and_takes(name: str) -> None:
    method, (_, _, experts, base, density, prune_by) = METHODS[name], METHOD_ROWS[name]
    low, high = method.experts
    assert experts == (str(low) if low == high else "any" if low == 1 else f"{low} or more")
    assert base == ("yes" if method.needs_base else "optional" if method.on == "either" else "a model like the others")
    assert density == ("yes" if "density" in method.parameters else "no")
    assert prune_by == ("" if density == "no" else "yes" if method.takes_scales else "no")


@pytest.mark.parametrize("name", OWN)
def test_every_parameter_has_a_row_that_names_the_method(name: str) -> None:
    for parameter in METHODS[name].parameters.values():
        told = [
            row
            for row in PARAMETER_ROWS
            if parameter.name in quoted(row[0]) and any(fnmatch(name, pattern) for pattern in quoted(row[2]))
        ]
        assert len(told) == 1, f"{len(told)} rows for {parameter.name} of {name}"
        assert ("(each)" in told[0][0]) == parameter.per_expert
        assert (told[0][1] == "required") == parameter.required


def test_no_row_is_of_a_parameter_that_there_is_not() -> None:
    known = {parameter for name in OWN for parameter in METHODS[name].parameters}
    assert {key for row in PARAMETER_ROWS for key in quoted(row[0])} <= known
