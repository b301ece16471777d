"""Tables of importance and densities: for a terminal, with layers down and projections across, and as rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lewis.allocation.densities import NEAR_UNIFORM, Allocation, covered_by, distance_to_uniform
from lewis.allocation.step import AllocationEntry
from lewis.importance.step import ImportanceEntry
from lewis.models.names import layer_of
from lewis.models.network.module_tree import Layer, projection_names
from lewis.reports.charts import VECTORS

WIDTH = 120  # of a table, in characters


def grid(layers: Sequence[Layer], values: Mapping[str, float | None], digits: str) -> str:
    """Format one number per layer and projection as a table; many projections, as of stacked experts, make several.

    Args:
        layers: the covered layers.
        values: key of a layer -> number; a layer without a number shows a dash.
        digits: format of a number, such as `.3f`.
    """
    projections = list(dict.fromkeys(layer.projection for layer in layers))
    cells: dict[int, dict[str, str]] = {}
    for layer in layers:
        value = values.get(layer.key)
        cells.setdefault(layer.index, {})[layer.projection] = "-" if value is None else format(value, digits)
    rows = [["layer", *projection_names(projections)]]
    rows += [[str(i), *(cells[i].get(name, "-") for name in projections)] for i in sorted(cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks = [[0]]  # for each table, the indices of its columns; column 0 is the layer
    for column in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[i] + 2 for i in (*blocks[-1], column)) > WIDTH:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join("\n".join("  ".join(row[i].rjust(widths[i]) for i in block) for row in rows) for block in blocks)


def allocation_text(ref: str, layers: Sequence[Layer], allocation: Allocation, parameters: int) -> str:
    """Format the densities of one expert as a table with a summary; `parameters` is how many the whole model has."""
    layers = [layer for layer in layers if layer.tensor in allocation.densities]
    covered = covered_by(layers, allocation)
    values: dict[str, float | None] = {layer.key: allocation.densities[layer.tensor] for layer in covered}
    size = sum(layer.parameters for layer in covered)
    deviations = [(allocation.densities[x.tensor] - allocation.mean) ** 2 * x.parameters for x in covered]
    spread = (sum(deviations) / size) ** 0.5 if size else 0.0
    reach = [allocation.densities[layer.tensor] for layer in covered] or [allocation.mean]
    distance = distance_to_uniform(layers, allocation)
    lines = [
        f"density of {ref}",
        grid(layers, values, ".3f"),
        f"mean {allocation.mean:.4f}, spread {spread:.4f} (standard deviation), {min(reach):.4f} to {max(reach):.4f}",
        f"covered: {len(covered)} layers, {100 * size / parameters:.1f} % of the parameters",
        f"{100 * distance:.1f} % of what is kept lies elsewhere than in a uniform allocation of the same mean",
    ]
    if distance < NEAR_UNIFORM:
        lines.append(f"warning: within {100 * NEAR_UNIFORM:.0f} % of uniform: this allocation guides next to nothing")
    return "\n".join(lines)


def importance_rows(measured: Sequence[ImportanceEntry], allocated: AllocationEntry) -> list[dict[str, Any]]:
    """Return one row per covered layer: its norm in each model, then difference and density of each expert.

    Differences are left out for an expert whose layers all moved equally far. If slices put layers in another order,
    rows for the layers of the result follow the rows for the models' own layers.
    """
    norms = {f"{entry.ref} on {entry.calibration}": entry.norms for entry in measured}
    experts = allocated.experts()
    moved = {ref for ref, each in experts.items() if len(set(each.differences.values())) > 1}

    def densities(key: str) -> dict[str, Any]:
        tensor, found = key.partition("[")[0], dict[str, Any]()  # of a part of a fused projection
        for ref, each in experts.items():
            found |= {f"D {ref}": _rounded(each.differences.get(key), 4)} if ref in moved else {}
            found |= {f"density {ref}": _rounded(each.densities.get(tensor), 4)}
        return found

    rows = []
    for key in next(iter(norms.values())):
        row: dict[str, Any] = {"layer": key.removesuffix(".weight")}
        row |= {name: _rounded(values.get(key), 6) for name, values in norms.items()}
        rows.append(row if allocated.stacked else row | densities(key))
    of_result = dict.fromkeys(key for each in experts.values() for key in each.differences) if allocated.stacked else ()
    return rows + [{"layer": f"result: {key.removesuffix('.weight')}", **densities(key)} for key in of_result]


def moved_rows(
    sizes: Mapping[str, Mapping[int, float]], allocated: AllocationEntry | None, most: int = 3
) -> list[dict[str, str]]:
    """Return the layers in which each expert moved most, with the mean density of their matrices; `-` where unknown.

    Args:
        sizes: expert -> layer -> norm of its task vector, relative to that of the base's weights.
        allocated: the densities; None for a plain merge.
        most: how many layers of each expert are returned at most.
    """
    kept: dict[str, dict[int, float]] = {}
    for ref, each in allocated.experts().items() if allocated and not allocated.stacked else ():
        of_layer: dict[int, list[float]] = {}
        for tensor, density in each.densities.items():
            if (layer := layer_of(tensor)) is not None and not VECTORS.search(tensor):
                of_layer.setdefault(layer, []).append(density)
        kept[ref] = {layer: sum(found) / len(found) for layer, found in of_layer.items()}
    rows = []
    for ref in dict.fromkeys([*sizes, *kept]):
        by = {layer: size for layer, size in sizes.get(ref, {}).items() if math.isfinite(size)} or kept.get(ref, {})
        for layer in sorted(by, key=lambda layer: (-by[layer], layer))[:most]:
            known = {"moved": sizes.get(ref, {}).get(layer), "kept": kept.get(ref, {}).get(layer)}
            shares = {name: "-" if share is None else f"{100 * share:.3g} %" for name, share in known.items()}
            rows.append({"expert": ref, "layer": str(layer), **shares})
    return rows


def _rounded(value: float | None, digits: int) -> float | None:
    """Round to a number of significant digits; None stays None: no token reached the layer, or it is excluded."""
    return None if value is None else float(f"{value:.{digits}g}")
