"""The picture of an inspection: how far each expert moved in each layer, and how their task vectors agree."""

from __future__ import annotations

import math

from lewis.inspection.result import Inspection
from lewis.reports.charts import COLOURS, png


def draw(inspection: Inspection) -> bytes:
    """Draw layers by experts, and experts by experts.

    Returns:
        A PNG file: left, the norm of each expert's task vector in each layer, divided by that of the base's weights, on
        a logarithmic scale; right, the cosine of the task vectors of each pair.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    measures, names = inspection.measures, inspection.names[1:]
    sizes = [measures.by_layer(i) for i in range(1, len(inspection.refs))]
    layers = sorted({layer for each in sizes for layer in each})
    rows = [[_positive(each.get(layer)) for each in sizes] or [math.nan] for layer in layers] or [[math.nan]]
    known = [value for row in rows for value in row if math.isfinite(value)]
    size = (5.5 + 0.8 * max(len(names), 1), min(3.2 + 0.14 * len(layers), 16))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(inspection.verdict, fontsize=9, wrap=True, parse_math=False)
    colours = colormaps[COLOURS].with_extremes(bad="lightgrey")
    scale = LogNorm(min(known), max(max(known), 1.01 * min(known))) if known else None
    image = left.imshow(rows, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    if known:
        figure.colorbar(image, ax=left)
    left.set_title("norm of the task vector\n/ norm of the base's weights", fontsize=9)
    left.set_ylabel("layer")
    left.set_yticks(range(0, len(layers), 1 + len(layers) // 40), layers[:: 1 + len(layers) // 40], fontsize=7)
    cosines = [[measures.between(i, j) for j in range(1, len(names) + 1)] for i in range(1, len(names) + 1)]
    right.imshow(cosines or [[math.nan]], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    right.set_title("cosine of task vectors", fontsize=9)
    for y, row in enumerate(cosines if len(names) <= 12 else []):
        for x, value in enumerate(row):
            ink = "white" if abs(value) > 0.6 else "black"
            right.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    right.set_yticks(range(len(names)), names, fontsize=7)
    for panel in (left, right):
        panel.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
    return png(figure)


def _positive(value: float | None) -> float:
    return value if value is not None and value > 0 else math.nan
