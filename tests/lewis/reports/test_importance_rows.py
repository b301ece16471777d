"""The table of a run's importance, of models whose layers are no whole tensors or were not reached."""

from types import SimpleNamespace
from typing import Any

from lewis.allocation.densities import Allocation
from lewis.reports.tables import importance_rows

Q, V, EXPERT, OUT = "h.0.qkv.weight[q]", "h.0.qkv.weight[v]", "h.0.experts.3.w1.weight", "h.1.qkv.weight"


def rows(densities: dict[str, float], differences: dict[str, float]) -> list[dict[str, Any]]:
    measured: Any = [SimpleNamespace(ref="e", calibration="s", norms={Q: 1.0, V: 2.0, EXPERT: None, OUT: 3.0})]
    allocated: Any = SimpleNamespace(experts=lambda: {"e": Allocation(densities, 0.5, differences)}, stacked=False)
    return importance_rows(measured, allocated)


def test_parts_have_their_tensors_density_and_what_was_not_reached_has_no_number() -> None:
    densities = {"h.0.qkv.weight": 0.4, EXPERT: 1.0}  # the recipe excludes h.1
    assert rows(densities, {Q: 0.1, V: 0.2}) == [
        {"layer": Q, "e on s": 1.0, "D e": 0.1, "density e": 0.4},
        {"layer": V, "e on s": 2.0, "D e": 0.2, "density e": 0.4},
        {"layer": "h.0.experts.3.w1", "e on s": None, "D e": None, "density e": 1.0},
        {"layer": "h.1.qkv", "e on s": 3.0, "D e": None, "density e": None},
    ]


def test_there_is_no_difference_where_none_decided() -> None:
    assert "D e" not in rows({"h.0.qkv.weight": 0.4, EXPERT: 1.0}, {Q: 1.0, V: 1.0})[0]
