"""The report on a canary: which share of the traffic the new version got, and how it compares with the old one.

The picture is in an artifact of the run that served the version, and in the page of the run that made it.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis.reports.charts import png
from lewis.reports.markdown import markdown_table, picture, plain
from lewis.reports.page import image, section, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_RULES = 8  # panels of a picture; the table has all rules
_GOOD, _BAD, _OLD = "#17803d", "#c02626", "#8793a3"


@dataclass(frozen=True)
class Measured:
    """The result of one rule at the end of a step of a canary.

    Attributes:
        name: of the rule.
        new: the value of the rule's query for the new server.
        old: the value for the old server, over the same time.
        limit: the largest value that the new server may have.
    """

    name: str
    new: float
    old: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the new server's value is within the limit."""
        return self.new <= self.limit

    def line(self) -> str:
        """Return the result as a text for messages."""
        return f"{self.name} {self.new:.3g} vs {self.old:.3g}, {'pass' if self.passed else 'FAIL'}"


@dataclass(frozen=True)
class Step:
    """A step of a canary.

    Attributes:
        share: percent of the requests that the new version got.
        requests: how many requests the new version had.
        seconds: how long the step took.
        rules: the results of the rules at its end; empty if the step was given up before.
    """

    share: int
    requests: float
    seconds: float
    rules: tuple[Measured, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the step came to its end and all rules hold."""
        return bool(self.rules) and all(each.passed for each in self.rules)


@dataclass(frozen=True)
class Canary:
    """How a version was put into service step by step.

    Attributes:
        target: label of the target.
        time: when it ended; UTC, ISO 8601.
        steps: in their order.
        why: why the version is not in service; empty if it is.
    """

    target: str
    time: str
    steps: tuple[Step, ...]
    why: str = ""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Canary":
        """Restore a canary from the mapping that `dataclasses.asdict` made of it."""
        rules = [tuple(Measured(**rule) for rule in each["rules"]) for each in content["steps"]]
        steps = (Step(**{**each, "rules": found}) for each, found in zip(content["steps"], rules, strict=True))
        return cls(content["target"], content["time"], tuple(steps), content["why"])

    def line(self) -> str:
        """Return the result of the canary as a text of one or two sentences."""
        if not self.why:
            return f"All {len(self.steps)} steps held: the new version has all traffic."
        failed = bool(self.steps and self.steps[-1].rules and not self.steps[-1].passed)
        at = f"Failed at {self.steps[-1].share} %" if failed else "Given up"
        return f"{at}: the old version has all traffic again. {self.why}"


def rows(canary: Canary) -> list[dict[str, str]]:
    """Return a row for each rule of each step of a canary; a step that was not judged has one row."""
    found = []
    for step in canary.steps:
        about = {"share": f"{step.share} %", "requests": f"{step.requests:.0f}", "seconds": f"{step.seconds:.0f}"}
        for rule in step.rules:
            numbers = {"new": f"{rule.new:.3g}", "old": f"{rule.old:.3g}", "at most": f"{rule.limit:.3g}"}
            found.append({**about, "rule": rule.name, **numbers, "": "pass" if rule.passed else "FAIL"})
        if not step.rules:
            empty = dict.fromkeys(("rule", "new", "old", "at most"), "-")
            found.append({**about, **empty, "": "not judged"})
    return found


def described(canary: Canary) -> str:
    """Describe the picture of a canary in words, for readers who cannot see it."""
    steps = [
        f"{step.share} % of the traffic, {step.requests:.0f} requests: "
        + ("; ".join(f"{rule.line()}, at most {rule.limit:.3g}" for rule in step.rules) or "not judged")
        for step in canary.steps
    ]
    return f"Canary at {canary.target}. {'. '.join(steps)}. {canary.line()}"


def draw(canary: Canary) -> bytes:
    """Draw a canary as a PNG file: the share step by step, and below it for each rule both servers and the limit."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(rule.name for step in canary.steps for rule in step.rules))[:MAX_RULES]
    width = min(max(5.0, 2.4 + 1.5 * len(canary.steps)), 14)
    figure = Figure(figsize=(width, 1.9 * (1 + len(names))), dpi=100, layout="constrained")
    first, *others = figure.subplots(1 + len(names), 1, squeeze=False, sharex=True)[:, 0]
    _draw_shares(first, canary.steps)
    for panel, name in zip(others, names, strict=True):
        found = [next((rule for rule in step.rules if rule.name == name), None) for step in canary.steps]
        _draw_rule(panel, name, found)
    if others:
        handles, labels = others[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8)
    (others or [first])[-1].set_xticks(
        range(len(canary.steps)), [f"{s.share} %\n{s.requests:.0f} requests" for s in canary.steps], fontsize=8
    )
    return png(figure)


def _draw_shares(panel: "Axes", steps: Sequence[Step]) -> None:
    colours = [_GOOD if step.passed else _BAD for step in steps]
    panel.bar(range(len(steps)), [step.share for step in steps], 0.6, color=colours)
    for x, step in enumerate(steps):
        word = "held" if step.passed else "failed" if step.rules else "not judged"
        panel.text(x, step.share + 3, word, ha="center", fontsize=8)
    panel.set_ylim(0, 115)
    panel.set_xlim(-0.6, len(steps) - 0.4)
    panel.set_title("percent of the traffic", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _draw_rule(panel: "Axes", name: str, found: Sequence[Measured | None]) -> None:
    places = [x for x, each in enumerate(found) if each]
    known = [each for each in found if each]
    for rule, x in zip(known, places, strict=True):
        panel.hlines(rule.limit, x - 0.35, x + 0.35, color="black", linestyle="--", linewidth=1)
    panel.plot([], [], color="black", linestyle="--", linewidth=1, label="at most")
    panel.bar([x - 0.16 for x in places], [each.old for each in known], 0.3, color=_OLD, label="old")
    colours = [_GOOD if each.passed else _BAD for each in known]
    panel.bar([x + 0.16 for x in places], [each.new for each in known], 0.3, color=colours, label="new")
    for x, rule in zip(places, known, strict=True):
        if not rule.passed:
            panel.annotate("FAIL", (x + 0.16, rule.new), ha="center", va="bottom", fontsize=8, color=_BAD)
    sizes = [size for each in known for size in (each.old, each.new, each.limit)]
    top = max(filter(math.isfinite, sizes), default=1.0)
    panel.set_ylim(0, 1.25 * top or 1.0)
    panel.set_title(name, fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def to_markdown(canary: Canary, uri: str) -> str:
    """Render a canary as Markdown, for an artifact of the run that served the version."""
    drawn = picture(described(canary), draw(canary))
    return f"# {uri} at {canary.target}\n\n{plain(canary.line())}\n\n{drawn}\n\n{markdown_table(rows(canary))}"


def into_page(page: str, canary: Canary) -> str:
    """Add a canary to the page of the run that made the version, in place of an earlier one at the same target."""
    begin, end = f"<!--canary {html.escape(canary.target)}-->", "<!--end of canary-->"
    old = re.compile(rf"{re.escape(begin)}.*?{re.escape(end)}\n", re.DOTALL)
    head, main, rest = old.sub("", page).rpartition("</main>")
    return f"{head}{begin}{_section(canary)}{end}\n{main}{rest}"


def _section(canary: Canary) -> str:
    colour, title = "bad" if canary.why else "good", f"Into service at {canary.target}"
    line = f'<p class="{colour}">{html.escape(canary.line())}</p>'
    content = f"{line}{image(draw(canary), described(canary))}{table(rows(canary))}"
    return section(title, content, f"{canary.time[:16].replace('T', ' ')} UTC")
