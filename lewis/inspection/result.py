"""The result of an inspection: findings and measures, as tables, Markdown, JSON and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis.inspection.kinds import KINDS, Finding
from lewis.inspection.measures import Measures
from lewis.models.source import short_names
from lewis.reports.charts import COLOURS, png
from lewis.reports.markdown import code, plain

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection of a recipe's models.

    Attributes:
        refs: references of the measured models, the base first; models that do not fit are only in the findings.
        findings: the findings, errors first.
        measures: measures of the weights, in the order of `refs`; experts of the same content are measured once.
        root: the folder that relative paths in `refs` start from (the recipe's folder).
    """

    refs: tuple[str, ...]
    findings: tuple[Finding, ...]
    measures: Measures
    root: Path

    @property
    def errors(self) -> list[Finding]:
        """The findings for which the merge would be wrong or worthless."""
        return [each for each in self.findings if each.level == "error"]

    @property
    def broken(self) -> list[str]:
        """The models that hold NaN or infinity."""
        tensors = self.measures.tensors
        return [ref for i, ref in enumerate(self.refs) if any(each.nans[i] or each.infinities[i] for each in tensors)]

    @property
    def verdict(self) -> str:
        """How many findings there are of each level, in one line."""
        if not self.findings:
            return "no findings: these models can be merged"
        warnings = len(self.findings) - len(self.errors)
        counts = [_count(len(self.errors), "error")] if self.errors else []
        counts += [_count(warnings, "warning")] if warnings else []
        kinds = ", ".join(dict.fromkeys(each.kind for each in self.findings))
        return f"{' and '.join(counts)}: {kinds}" + ("; do not merge these models as they are" if self.errors else "")

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows of a table with the measures of each expert."""
        return [
            {
                "model": name,
                "size": f"{self.measures.size(i):.3g}",
                "cosine with base": f"{self.measures.cosine(i):.5f}",
                "unchanged": f"{self.measures.unchanged(i):.1%}",
                "layers": bars(list(self.measures.by_layer(i).values())),
            }
            for i, name in enumerate(self.names[1:], 1)
        ]

    @property
    def pairs(self) -> list[dict[str, str]]:
        """The rows of a table with the measures of each pair of experts."""
        experts = range(1, len(self.refs))
        return [
            {
                "models": f"{self.names[i]} and {self.names[j]}",
                "cosine": f"{self.measures.between(i, j):.3f}",
                "opposite signs": f"{self.measures.conflict(i, j):.1%}",
            }
            for i in experts
            for j in experts
            if i < j
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as plain JSON data; numbers that cannot be measured are null."""
        experts, measures = range(1, len(self.refs)), self.measures
        models = [
            {
                "model": self.refs[i],
                "size": _number(measures.size(i)),
                "size_by_layer": {str(layer): _number(size) for layer, size in measures.by_layer(i).items()},
                "cosine": _number(measures.cosine(i)),
                "unchanged": measures.unchanged(i),
                "with": {
                    self.refs[j]: {
                        "cosine": _number(measures.between(i, j)),
                        "conflict": _number(measures.conflict(i, j)),
                    }
                    for j in experts
                    if j != i
                },
            }
            for i in experts
        ]
        found = [each.to_json() for each in self.findings]
        return {"base": self.refs[0], "models": models, "findings": found, "verdict": self.verdict}

    def to_markdown(self) -> str:
        """Return the verdict and the findings as Markdown."""
        lines = [f"**{plain(self.verdict)}**", ""]
        for each in self.findings:
            kind = KINDS[each.kind]
            lines.append(f"* **{each.level}: {each.kind}**, {code(each.model)}: {plain(each.what)}")
            lines += [f"  Meaning: {kind.meaning}.", f"  What to do: {kind.fix}."]
        return "\n".join(lines)

    @property
    def names(self) -> list[str]:
        """The names of the models in tables and pictures, in the order of `refs`."""
        return ["base", *short_names(self.refs[1:], self.root)]


def bars(values: Sequence[float]) -> str:
    """Draw values as a line of bar characters, the largest as the highest; those that are not finite as spaces."""
    known = [value for value in values if math.isfinite(value)]
    top = max(known, default=0.0)
    return "".join(_BARS[min(int(8 * value / top), 7)] if top and math.isfinite(value) else " " for value in values)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("s" if number != 1 else "")


def draw(inspection: Inspection) -> bytes:
    """Draw two heat maps of an inspection: layers by experts, and experts by experts.

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
    figure.suptitle(inspection.verdict, fontsize=9, wrap=True)
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
