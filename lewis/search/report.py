"""The report of a search: a table of its trials, a plot of their history, and the Pareto front of two metrics."""

from collections.abc import Sequence
from typing import Any

from lewis.reports.charts import png
from lewis.search.study import Objective, Trial

_COLOURS = {"done": "#31688e", "front": "#35b779", "pruned": "#b0b0b0"}


def rows(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[dict[str, str]]:
    """Return one row per trial: state, scores, values, seconds, and the reason if it failed."""
    found = []
    for trial in trials:
        row = {"trial": str(trial.number), "state": trial.state}
        for number, objective in enumerate(objectives):
            row[objective.label] = f"{trial.scores[number]:.4g}" if trial.state == "done" else ""
        row |= {path: str(value) for path, value in trial.values.items()}
        found.append({**row, "seconds": f"{trial.seconds:.0f}", "reason": trial.reason})
    return found


def history(trials: Sequence[Trial], objectives: Sequence[Objective]) -> bytes:
    """Plot the score of each trial and the best so far, one panel per metric; a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(objectives)), dpi=100, layout="constrained")
    panels = figure.subplots(len(objectives), 1, squeeze=False)[:, 0]
    done = [trial for trial in trials if trial.state == "done"]
    other = [trial.number for trial in trials if trial.state in ("pruned", "failed")]
    for number, (panel, objective) in enumerate(zip(panels, objectives, strict=True)):
        scores = [trial.scores[number] for trial in done]
        better = max if objective.higher_is_better else min
        best = [better(scores[: i + 1]) for i in range(len(scores))]
        at = [trial.number for trial in done]
        panel.scatter(at, scores, color=_COLOURS["done"], s=24, label="a trial", zorder=3)
        panel.step(at, best, where="post", color=_COLOURS["front"], linewidth=1.8, label="the best so far")
        if scores and done[0].number == 0:
            panel.axhline(scores[0], color="dimgrey", linewidth=1, linestyle="--", label="the first trial")
        for place in other:
            panel.axvline(place, color=_COLOURS["pruned"], linewidth=1, alpha=0.6, zorder=1)
        panel.set_title(objective.label, fontsize=10, loc="left")
        panel.set_xlabel("trial (grey lines: given up or failed)" if other else "trial", fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return png(figure)


def pareto(trials: Sequence[Trial], front: Sequence[Trial], objectives: Sequence[Objective]) -> bytes:
    """Plot two metrics against each other, with the trials that no other beats in both; a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), dpi=100, layout="constrained")
    panel = figure.subplots()
    done = [trial for trial in trials if trial.state == "done"]
    panel.scatter(*_points(done), color=_COLOURS["done"], s=24, label="a trial")
    best = sorted(front, key=lambda trial: trial.scores)
    panel.plot(*_points(best), color=_COLOURS["front"], marker="o", linewidth=1.8, label="the Pareto front")
    for trial in best:
        panel.annotate(
            str(trial.number), (trial.scores[0], trial.scores[1]), (4, 4), textcoords="offset points", fontsize=8
        )
    panel.set_xlabel(objectives[0].label)
    panel.set_ylabel(objectives[1].label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=9)
    return png(figure)


def _points(trials: Sequence[Trial]) -> tuple[list[Any], list[Any]]:
    return [trial.scores[0] for trial in trials], [trial.scores[1] for trial in trials]
