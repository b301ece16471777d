"""What an inspection gives: findings, measures, and both for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis.inspection.kinds import Finding
from lewis.inspection.measures import Measures
from lewis.models.source import short_names
from lewis.reports.markdown import code, plain

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Inspection:
    """What was found out about the models of a recipe.

    Attributes:
        refs: of the models that were measured, the base first; those that do not fit are only in the findings.
        findings: errors first.
        measures: of the weights, in the order of `refs`; an expert of the same content as another is measured once.
        root: where relative folders in `refs` start (the recipe's folder).
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
    def verdict(self) -> str:
        """One line."""
        if not self.findings:
            return "no findings: these models can be merged"
        warnings = len(self.findings) - len(self.errors)
        told = [_count(len(self.errors), "error")] if self.errors else []
        told += [_count(warnings, "warning")] if warnings else []
        kinds = ", ".join(dict.fromkeys(each.kind for each in self.findings))
        return f"{' and '.join(told)}: {kinds}" + ("; do not merge these models as they are" if self.errors else "")

    @property
    def rows(self) -> list[dict[str, str]]:
        """A row for each expert, for a table."""
        rows = []
        for i, name in enumerate(self.names[1:], 1):
            row = {
                "model": name,
                "size": f"{self.measures.size(i):.3g}",
                "cosine with base": f"{self.measures.cosine(i):.5f}",
                "unchanged": f"{self.measures.unchanged(i):.1%}",
                "layers": bars(list(self.measures.by_layer(i).values())),
            }
            rows.append(row)
        return rows

    @property
    def pairs(self) -> list[dict[str, str]]:
        """A row for each pair of experts, for a table."""
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
        """As plain JSON data; what cannot be measured is null."""
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
        """The findings as Markdown, the verdict first."""
        lines = [f"**{plain(self.verdict)}**", ""]
        for each in self.findings:
            told = each.to_json()
            lines.append(f"* **{each.level}: {each.kind}**, {code(each.model)}: {plain(each.what)}")
            lines += [f"  Meaning: {told['meaning']}.", f"  What to do: {told['fix']}."]
        return "\n".join(lines)

    @property
    def names(self) -> list[str]:
        """What tables and pictures call the models, in the order of `refs`."""
        return ["base", *short_names(self.refs[1:], self.root)]


def bars(values: Sequence[float]) -> str:
    """A line of bars, the largest value the highest."""
    known = [value for value in values if math.isfinite(value)]
    top = max(known, default=0.0)
    return "".join(_BARS[min(int(8 * value / top), 7)] if top and math.isfinite(value) else " " for value in values)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("s" if number != 1 else "")
