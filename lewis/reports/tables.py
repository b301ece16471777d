"""What importance and allocation did, for a terminal: layers down, projections across, and a summary."""

from collections.abc import Mapping, Sequence

from lewis.allocation.densities import NEAR_UNIFORM, Allocation, covered_by, distance_to_uniform
from lewis.importance.architecture import Layer, projection_names

WIDTH = 120  # of a table, in characters


def grid(layers: Sequence[Layer], values: Mapping[str, float | None], digits: str) -> str:
    """One number per layer and projection; where there are many projections, as of stacked experts, in several tables.

    Args:
        layers: the covered layers.
        values: key of a layer -> number; None or absent: a dash.
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
    blocks = [[0]]  # columns beside each other, the layer first
    for column in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[i] + 2 for i in (*blocks[-1], column)) > WIDTH:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join("\n".join("  ".join(row[i].rjust(widths[i]) for i in block) for row in rows) for block in blocks)


def allocation_text(ref: str, layers: Sequence[Layer], allocation: Allocation, parameters: int) -> str:
    """The densities of one expert and what they amount to.

    Args:
        ref: the expert.
        layers: the covered layers.
        allocation: its densities.
        parameters: of the whole model.
    """
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
