"""Pictures: density heat map, score bars, champions over time. Those of a merge are drawn once and kept in the store.

Figures are made without pyplot, whose global state is not safe in threads.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.evaluation.statistics.scored import intervals, scores_of
from lewis.evaluation.statistics.scores import Score
from lewis.evaluation.step import ModelScores, scored_models
from lewis.models.network.module_tree import projection_names
from lewis.store import kinds, remote
from lewis.store.sealed_json import DamagedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"  # readable for colour-blind readers and in grey
MAX_BARS = 80  # more are too thin to read
MAX_LABEL = 60  # characters
MAX_COLUMNS = 48  # the most column names that fit below a heat map
MOVES = ("promoted", "promoted by hand", "approved", "rolled back", "repaired")  # what made a version the champion
SEMANTICS = "2"  # raise it when the same numbers would be drawn in another way
SLANTED = 4  # with more groups, horizontal labels would overlap

VECTORS = re.compile(r"norm|\bln_|\.bias$")  # norms and biases, to which LEWIS gives no density of their own
LAYER = re.compile(r"^(.*?)(?:^|\.)(\d+)\.(.+)$")


Intervals = Mapping[tuple[str, str, str], tuple[float, float]]


def density_heat_map(densities: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> bytes:
    """Draw how much of each expert's task vector is kept: one panel per expert, layers down, projections across.

    Args:
        densities: expert -> tensor name -> density in [0, 1]. Embeddings, norms and biases are left out.
        mean: expert -> mean density, for the title.

    Returns:
        a PNG file, readable with up to 80 layers.
    """
    from matplotlib.figure import Figure

    grids = {expert: grid_of(values) for expert, values in densities.items()}
    columns = max((len(names) for names, _ in grids.values()), default=1)
    layers = max((len(grid[0]) for _, grid in grids.values() if grid), default=1)
    width = min(2.2 + 0.42 * max(columns, 2), 9)
    longest = max((len(name) for names, _ in grids.values() for name in names), default=0)
    labels = 0.07 * max(longest - 12, 0)  # inches
    size = (width * max(len(grids), 1), min(1.8 + 0.17 * layers, 18) + labels)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(1, max(len(grids), 1), squeeze=False)[0]
    for panel, (expert, (names, grid)) in zip(panels, grids.items(), strict=False):
        image = _draw_grid(panel, names, grid)
        title = _clipped(expert, 40) + (f"\nmean density {mean[expert]:.3f}" if expert in mean else "")
        panel.set_title(title, fontsize=9, loc="left")
        if panel is panels[-1]:  # one scale for all
            figure.colorbar(image, ax=panels.tolist(), label="density", ticks=[0, 0.25, 0.5, 0.75, 1], aspect=40)
    return png(figure)


def score_bars(scores: Mapping[str, Sequence[Score]], intervals: Intervals | None = None) -> bytes:
    """Draw the scores, one group of bars per task and metric, one bar per model with its 95 % interval.

    Args:
        scores: model -> scores, in the order of the bars; the last model is outlined.
        intervals: (model, task, metric) -> ends of the interval; by default 1.96 standard errors on both sides.

    Returns:
        a PNG file. A metric with values outside of [0, 1], such as perplexity, gets a panel of its own.
    """
    from matplotlib.figure import Figure

    found = {(model, s.task, s.metric): s for model, each in scores.items() for s in each}
    groups = list(dict.fromkeys((s.task, s.metric) for s in found.values()))
    panels: dict[str, list[tuple[str, str]]] = {}
    for task, metric in groups[: max(1, MAX_BARS // max(len(scores), 1))]:
        values = [s.value for key, s in found.items() if key[1:] == (task, metric)]
        panels.setdefault("score" if all(0 <= v <= 1 for v in values) else metric, []).append((task, metric))
    widest = max((len(each) for each in panels.values()), default=1)
    width = min(max(5.0, 2.5 + 0.28 * widest * (len(scores) + 1)), 16)
    figure = Figure(
        figsize=(width, (5.0 if widest > SLANTED else 3.6) * max(len(panels), 1)), dpi=100, layout="constrained"
    )
    axes = figure.subplots(max(len(panels), 1), 1, squeeze=False)[:, 0]
    for panel, (label, shown) in zip(axes, panels.items(), strict=False):
        _draw_bars(panel, list(scores), shown, found, intervals or {})
        panel.set_ylabel(label)
    if panels:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), fontsize=9)
    hidden = len(groups) - sum(len(each) for each in panels.values())
    if hidden:
        figure.supxlabel(f"{hidden} more in the table", fontsize=9)
    return png(figure)


def champion_steps(
    points: Sequence[tuple[int, int, str, float | None, float | None]],
    metric: str,
    luck: Sequence[float] = (),
    without: Sequence[int] = (),
) -> bytes:
    """Draw a score over a history of versions: a dot for each version, a line for the champion.

    Args:
        points: for each entry of the history: step, version, event, the version's score, the champion's since then.
        metric: the score's name, for the axis.
        luck: for each entry, what the best of so many equal versions would score by luck; empty: that is not known.
        without: versions that have no dot, since they were scored on other documents.

    Returns:
        a PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(4.5 + 0.35 * len(points), 12), 3.4), dpi=100, layout="constrained")
    panel, places = figure.subplots(), range(len(points))
    ink, line = colormaps[COLOURS](0.25), colormaps[COLOURS](0.7)
    panel.step(places, [math.nan if p[4] is None else p[4] for p in points], where="post", color=line, linewidth=2)
    if luck:
        panel.plot(places, luck, color="dimgrey", linewidth=1, linestyle=":", label="the best of equals, by luck")
    for label, chosen, face in (("promoted", True, ink), ("not promoted", False, "white")):
        shown = [(x, p[3]) for x, p in enumerate(points) if p[3] is not None and (p[2] in MOVES) == chosen]
        if shown:
            across, up = [x for x, _ in shown], [y for _, y in shown]
            panel.scatter(across, up, s=34, color=face, edgecolor=ink, label=label, zorder=3)
    every = -(-len(points) // 24)  # labels of more would overlap
    names = [f"v{p[1]}" if p[2] in ("promoted", "rejected") else f"v{p[1]}\n{p[2]}" for p in points]
    panel.set_xticks(list(places)[:: every or 1], names[:: every or 1], fontsize=8)
    panel.set_ylabel(metric, fontsize=9)
    named = ", ".join(f"v{version}" for version in without[:8]) + (", …" if len(without) > 8 else "")
    aside = f"\nscored on other documents: {named}" if without else ""
    panel.set_title(f"the line is the champion{aside}", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return png(figure)


def grid_of(values: Mapping[str, float]) -> tuple[list[str], list[list[float]]]:
    """Arrange tensor name -> value as a grid; tensors outside of layers, norms and biases are left out.

    Returns:
        The names of the projections, and for each of them its values, one per layer; NaN where a layer lacks it.
    """
    found = [(layer, rho) for tensor, rho in values.items() if (layer := LAYER.search(tensor))]
    shown = [(layer, rho) for layer, rho in found if not VECTORS.search(layer[0])]
    several = len({layer[1] for layer, _ in shown}) > 1  # such as an encoder and a decoder
    places = {}
    for layer, density in shown:
        name = layer[3].removesuffix(".weight")
        places[f"{layer[1]}.{name}" if several else name, int(layer[2])] = density
    full = list(dict.fromkeys(name for name, _ in places))
    layers = range(max((index for _, index in places), default=-1) + 1)
    return projection_names(full), [[places.get((name, index), math.nan) for index in layers] for name in full]


def _draw_grid(panel: "Axes", names: Sequence[str], grid: Sequence[Sequence[float]]) -> Any:
    from matplotlib import colormaps

    colours = colormaps[COLOURS].with_extremes(bad="lightgrey")
    rows = [list(row) for row in zip(*grid, strict=True)] or [[math.nan]]
    image = panel.imshow(rows, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    every = -(-len(names) // MAX_COLUMNS)  # labels of more would overlap
    panel.set_xticks(range(0, len(names), every or 1), names[:: every or 1], fontsize=8, rotation=90)
    panel.set_yticks(range(len(rows)), [str(i) for i in range(len(rows))], fontsize=8 if len(rows) <= 40 else 7)
    panel.set_ylabel("layer", fontsize=9)
    for y, row in enumerate(rows if len(rows) <= 32 and len(names) <= 16 else []):
        for x, value in enumerate(row):
            if not math.isnan(value):
                ink = "black" if value > 0.6 else "white"
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
    return image


def _draw_bars(
    panel: "Axes",
    models: Sequence[str],
    groups: Sequence[tuple[str, str]],
    found: Mapping[tuple[str, str, str], Score],
    intervals: Intervals,
) -> None:
    from matplotlib import colormaps

    width = 0.8 / max(len(models), 1)
    for number, model in enumerate(models):
        bars = [(x, found[model, *group]) for x, group in enumerate(groups) if (model, *group) in found]
        panel.bar(
            [x - 0.4 + (number + 0.5) * width for x, _ in bars],
            [score.value for _, score in bars],
            width * 0.92,
            yerr=[list(side) for side in zip(*(reach(model, s, intervals) for _, s in bars), strict=True)] or None,
            error_kw={"ecolor": "dimgrey", "elinewidth": 1, "capsize": 2},
            color=colormaps[COLOURS](0.1 + 0.85 * number / max(len(models) - 1, 1)),
            edgecolor="black" if number == len(models) - 1 else "none",
            linewidth=1.2,
            label=_clipped(model),
        )
    arrows = [next(s for key, s in found.items() if key[1:] == group).arrow for group in groups]
    labels = [f"{_clipped(task)}\n{metric} {arrow}" for (task, metric), arrow in zip(groups, arrows, strict=True)]
    slanted = len(groups) > SLANTED
    panel.set_xlim(-0.6, len(groups) - 0.4)
    panel.set_xticks(
        range(len(groups)), labels, fontsize=8, rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    panel.spines[["top", "right"]].set_visible(False)


def reach(model: str, score: Score, intervals: Intervals) -> tuple[float, float]:
    """Return how far the 95 % interval of a model's score reaches below and above it; NaN where that is not known."""
    if ends := intervals.get((model, score.task, score.metric)):
        return max(0.0, score.value - ends[0]), max(0.0, ends[1] - score.value)
    side = math.nan if score.stderr is None else 1.96 * score.stderr
    return side, side


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file; a dollar sign in its texts, such as in a user's name, begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text():  # matplotlib's own formulas, at the ticks of a logarithmic scale, come later
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _clipped(name: str, length: int = MAX_LABEL) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def densities(allocated: AllocationEntry) -> bytes:
    """Return the `density_heat_map` of an allocation as a PNG file, drawn or from the store."""

    def draw() -> bytes:
        shown = {ref: each.densities for ref, each in allocated.experts().items()}
        return density_heat_map(shown, allocated.means)

    return _kept(["densities", allocated.digest], draw)


def scores(weights: Mapping[str, float], found: Mapping[str, ModelScores]) -> bytes:
    """Return the `score_bars` of what was scored, with 95 % intervals, as a PNG file, drawn or from the store.

    Args:
        weights: `evaluate.weights` of the recipe; empty: there is no weighted mean.
        found: label -> scores, in the order of the bars.
    """

    def draw() -> bytes:
        models = scored_models(weights, found)
        return score_bars(scores_of(models), intervals(models))

    return _kept(["scores", [[label, entry.digest] for label, entry in found.items()], dict(weights)], draw)


def _kept(shown: list[Any], draw: Callable[[], bytes]) -> bytes:
    path = kinds.PICTURES.path(store.digest([SEMANTICS, *shown]))
    store.mark_used(path)
    remote.fetch(path)
    try:
        found = path.read_bytes()
        kinds.check_png(found)
        return found
    except FileNotFoundError:
        pass
    except DamagedError as error:
        store.set_aside([path], str(error))
    drawn = draw()
    store.write_bytes(path, drawn)
    remote.push(path)
    return drawn
