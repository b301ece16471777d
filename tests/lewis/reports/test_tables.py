"""Tables for a terminal, parsed back."""

import math
from pathlib import Path

import pytest

from lewis import store
from lewis.allocation.densities import Allocation
from lewis.allocation.step import AllocationEntry
from lewis.models.network.module_tree import Layer
from lewis.reports.tables import allocation_text, grid, moved_rows
from lewis.store import kinds

LAYERS = [Layer(f"m.{i}.{kind}.weight", i, kind, size) for i in range(2) for kind, size in (("a.q", 10), ("b.up", 30))]


def test_layers_go_down_and_projections_across() -> None:
    text = grid(LAYERS, {LAYERS[0].key: 0.25, LAYERS[1].key: 0.5, LAYERS[3].key: 1.0}, ".2f")
    assert [line.split() for line in text.splitlines()] == [
        ["layer", "q", "up"],
        ["0", "0.25", "0.50"],
        ["1", "-", "1.00"],
    ]


def test_projections_that_do_not_fit_beside_each_other_follow_below() -> None:
    layers = [Layer(f"m.{i}.experts.{e}.w1", i, f"experts.{e}.w1", 4) for i in range(2) for e in range(30)]
    tables = grid(layers, {layer.key: 0.5 for layer in layers}, ".2f").split("\n\n")
    assert all(len(line) <= 120 for table in tables for line in table.splitlines())
    assert [column for table in tables for column in table.split("\n")[0].split()[1:]] == [
        f"experts.{e}.w1" for e in range(30)
    ]
    assert all([row.split()[0] for row in table.splitlines()] == ["layer", "0", "1"] for table in tables)


def test_the_summary_tells_mean_spread_share_and_distance() -> None:
    densities = dict(zip((x.tensor for x in LAYERS), [0.2, 0.4, 0.6, 0.4], strict=True))
    text = allocation_text("org/math", LAYERS, Allocation(densities, 0.4, {}), 160)
    assert "mean 0.4000, spread 0.1000 (standard deviation), 0.2000 to 0.6000" in text
    assert "covered: 4 layers, 50.0 % of the parameters" in text
    assert "6.2 % of what is kept lies elsewhere" in text and "warning" not in text


def test_an_allocation_that_is_nearly_uniform_is_warned_of() -> None:
    densities = dict.fromkeys((x.tensor for x in LAYERS), 0.4)
    assert "within 2 % of uniform" in allocation_text("e", LAYERS, Allocation(densities, 0.4, {}), 80)


def test_the_layers_that_moved_most_and_what_is_kept_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path))
    densities = {"m.layers.0.q.weight": 0.2, "m.layers.0.up.weight": 0.4, "m.layers.0.norm.weight": 1.0}
    densities |= {"m.layers.1.q.weight": 0.8, "m.embed.weight": 1.0}
    path = kinds.ALLOCATIONS.path("0" * 64)
    store.write_entry(path, {"experts": {"math": Allocation(densities, 0.5, {}).to_json()}})
    allocated = AllocationEntry(digest="0" * 64, path=path, means={})
    sizes = {"math": {0: 0.01, 1: 0.5, 2: math.nan}, "code": {0: 0.1, 1: 0.3, 2: 0.3, 3: 0.2}}
    rows = moved_rows(sizes, allocated)
    assert [tuple(row.values()) for row in rows] == [
        ("math", "1", "50 %", "80 %"),
        ("math", "0", "1 %", "30 %"),
        *(("code", layer, moved, "-") for layer, moved in (("1", "30 %"), ("2", "30 %"), ("3", "20 %"))),
    ]
    assert [row["moved"] for row in moved_rows({}, allocated)] == ["-", "-"]  # the store has no inspection
    assert {row["kept"] for row in moved_rows(sizes, None)} == {"-"}  # a plain merge
    others = moved_rows(sizes, allocated.model_copy(update={"stacked": True}))
    assert {row["kept"] for row in others} == {"-"}  # densities of other layers than the base's
