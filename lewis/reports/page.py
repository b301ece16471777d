"""The page of a run: one HTML file that needs nothing else, readable in light and dark.

It holds no script and loads nothing, which its content policy enforces. Every text is escaped: names come from users,
answers from models.
"""

import base64
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lewis.evaluation.gate import NOTE
from lewis.evaluation.statistics.retained_gain import BASE, BASELINES
from lewis.evaluation.statistics.scored import MERGED
from lewis.evaluation.statistics.scores import Score
from lewis.reports.charts import Intervals, grid_of, reach
from lewis.reports.page_style import STYLE
from lewis.reports.run_report import Change, RunFacts, duration, short
from lewis.reports.side_by_side import LAYERS, answer_rows, loss_lines, lost_rows

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MAX_METRICS, MAX_COLUMNS, MAX_STEPS = 24, 16, 60  # more are in the tables
SHOWN = 3  # documents with answers that are visible; the others are folded
_GAP, _HEIGHT = 12, 44  # of the boxes in the drawing of the lineage, in units of its view box
_URL = re.compile(r"https?://[^\s\"'<>]+")


@dataclass(frozen=True)
class StepTime:
    """When one step of a run began, how long it ran and how it ended.

    Attributes:
        name: of the step.
        state: how it ended, such as `Completed` or `Cached`.
        begin: seconds from the start of the run.
        seconds: how long it ran.
    """

    name: str
    state: str
    begin: float
    seconds: float


@dataclass(frozen=True)
class PageFacts:
    """Facts of a run that its page shows and its Markdown report does not.

    Attributes:
        roles: input of the merge -> `base`, `expert` or `rows`.
        moved: expert -> tensor -> norm of its task vector, relative to the base's weights.
        densities: expert -> tensor -> density in [0, 1]; empty for a plain merge.
        steps: in the order in which they began.
        intervals: (label, task, metric) -> 95 % interval of a score.
        recipe: its YAML text, without `serve`.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    densities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    steps: Sequence[StepTime] = ()
    intervals: Intervals = field(default_factory=dict)
    recipe: str = ""


def to_html(facts: RunFacts, more: PageFacts) -> str:
    """Render the page of a run as HTML; sections without content are left out."""
    parts = [
        _head(facts, more),
        section("Scores", _scores(facts, more), "Each score with its 95 % interval; the merged model is the last row."),
        section(
            "What is kept of each expert's gain",
            _kept(facts),
            "On the task on which an expert is best: 0 % is the base, 100 % the expert, the dot the merged model.",
        ),
        section("The gate", _gate(facts), f"Compared with {facts.verdict.compared_with}." if facts.verdict else ""),
        section("Why it is worse", _losses(facts)),
        section(
            "Where the experts moved",
            _maps(more.moved, logarithmic=True),
            "Norm of the task vector, relative to the base's weights, by layer and projection.",
        ),
        section("What is kept of the task vectors", _maps(more.densities), "Density by layer and projection."),
        section("Answers side by side", _answers(facts)),
        section("Lineage", _lineage(facts, more), "Orange: moved or new since the champion." * bool(facts.champion)),
        section(
            "What each step took", _steps(more.steps), "Seconds from the start of the run; found results are pale."
        ),
        *(section(title, image(png, title)) for title, png in facts.pictures.items() if "champion" in title.lower()),
        section(
            "Recipe", f"<details><summary>show</summary><pre>{_e(more.recipe)}</pre></details>" * bool(more.recipe)
        ),
    ]
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="referrer" content="no-referrer">'
        f"<title>{_e(facts.recipe)}: {_e(_outcome(facts)[1])}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, parts))}\n</main></body></html>\n"
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # answers can hold half of a surrogate pair


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def section(title: str, content: str, note: str = "") -> str:
    """Return a section with a title as HTML; empty without content."""
    above = f'<p class="note">{_e(note)}</p>' if note else ""
    return f"<section><h2>{_e(title)}</h2>{above}{content}</section>" if content else ""


def _outcome(facts: RunFacts) -> tuple[str, str]:
    """Return the CSS class and the words for the outcome of a run."""
    verdict = facts.verdict
    if verdict is None:
        return "soft", "merged"
    if verdict.waits:
        return "wait", "waits for approval"
    return ("good", "passed the gate") if verdict.passed else ("bad", "rejected")


def _head(facts: RunFacts, more: PageFacts) -> str:
    colour, word = _outcome(facts)
    links = " · ".join(
        f'<a href="{_e(url)}">{_e(text)}</a>' if _URL.fullmatch(url) else f"{_e(text)}: {_e(url)}"
        for text, url in facts.links.items()
    )
    computed, found = (sum(each[i] for each in facts.work.values()) for i in (0, 1))
    tiles = [
        ("duration", duration(facts.seconds)),
        ("steps computed; others found", f"{computed} of {computed + found}"),
    ]
    if kept := [value for each in facts.kept if (value := _percent(each["kept"])) is not None]:
        tiles.append(("kept of the experts' gains, mean", f"{sum(kept) / len(kept):.0f} %"))
    tiles += _scores_tile(facts)
    tiles.append(("experts", str(sum(role == "expert" for role in more.roles.values()) or len(facts.means))))
    shown = "".join(f'<div><span class="soft">{_e(name)}</span><b>{_e(value)}</b></div>' for name, value in tiles)
    lines = [facts.adapter, facts.fit, facts.warning]
    about = "".join(f'<p class="soft">{_e(each)}</p>' for each in lines if each)
    return (
        f"<header><h1>{_e(facts.recipe)}</h1>"
        f'<span class="mark {colour}">{_e(word)}</span><span>{_e(facts.outcome)}</span>'
        f'<p class="soft">Started {_e(facts.why)}. Merge digest <code>{_e(short(facts.digest))}</code>. {links}</p>'
        f'{about}<div class="tiles">{shown}</div></header>'
    )


def _scores_tile(facts: RunFacts) -> list[tuple[str, str]]:
    """Return the tile with the merged model's and the base's score, in the gate's metric, else the first of both."""
    ours, base = ({s.key: s.value for s in facts.scores.get(label, ())} for label in (MERGED, BASE))
    wanted = [facts.verdict.metric] if facts.verdict and facts.verdict.metric else [*ours]
    keys = [key for key in wanted if key in ours and key in base][:1]
    return [(f"{key.partition(',')[0]}: merged, base", f"{ours[key]:.3g}, {base[key]:.3g}") for key in keys]


def _scores(facts: RunFacts, more: PageFacts) -> str:
    found = {(label, s.task, s.metric): s for label, each in facts.scores.items() for s in each}
    groups = list(dict.fromkeys(key[1:] for key in found))
    blocks = [_forest(group, facts, found, more.intervals) for group in groups[:MAX_METRICS]]
    if not blocks:
        return ""
    rest = (
        f'<p class="note">{len(groups) - MAX_METRICS} more are in the table.</p>' if len(groups) > MAX_METRICS else ""
    )
    compared = ""
    if facts.comparison:
        compared = f"<details><summary>Compared, document by document</summary>{table(facts.comparison)}</details>"
    return "".join(blocks) + rest + compared


def _forest(
    group: tuple[str, str], facts: RunFacts, found: Mapping[tuple[str, str, str], Score], intervals: Intervals
) -> str:
    """Draw one metric: a row for each model, with its score as a dot and the interval as a bar, on a common scale."""
    task, metric = group
    rows = [(label, s) for label in facts.scores if (s := found.get((label, task, metric))) and math.isfinite(s.value)]
    ends = {label: _ends(label, s, intervals) for label, s in rows}
    low, high = min((e[0] for e in ends.values()), default=0.0), max((e[1] for e in ends.values()), default=1.0)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = (max(0.0, low - room) if low >= 0 else low - room), high + room
    if all(0 <= s.value <= 1 for _, s in rows):
        high = min(high, 1.0)

    def at(value: float) -> float:
        return 100 * (min(value, high) - low) / (high - low)

    shown = []
    for label, score in rows:
        begin, end = ends[label]
        spread = f" ± {(end - begin) / 2:.2g}" if end > begin else ""
        shown.append(
            f'<div class="row{" ours" * (label == MERGED)}" style="--c:var(--{_colour(label)})">'
            f'<span title="{_e(label)}">{_e(label)}</span><div class="track">'
            f'<i class="reach" style="left:{at(begin):.2f}%;width:{at(end) - at(begin):.2f}%"></i>'
            f'<i class="dot" style="left:{at(score.value):.2f}%"></i></div>'
            f"<span>{score.value:.4g}<span class=soft>{spread}</span></span></div>"
        )
    arrow = "higher is better ↑" if rows and rows[0][1].higher_is_better else "lower is better ↓"
    axis = f'<div class="row axis"><span></span><span><b>{low:.3g}</b><b>{high:.3g}</b></span><span></span></div>'
    return f'<h3>{_e(task)} <span class="soft">{_e(metric)}, {arrow}</span></h3>{"".join(shown)}{axis}'


def _ends(label: str, score: Score, intervals: Intervals) -> tuple[float, float]:
    below, above = (side if math.isfinite(side) else 0.0 for side in reach(label, score, intervals))
    return score.value - below, score.value + above


def _colour(label: str) -> str:
    if label == MERGED:
        return "ours"
    return "base" if label == BASE or label in BASELINES else "other"


def _kept(facts: RunFacts) -> str:
    shares = [_percent(each["kept"]) for each in facts.kept]
    known = [share for share in shares if share is not None]
    low, high = min([0.0, *known]) - 5, max([100.0, *known]) + 5

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    rows = []
    for each, share in zip(facts.kept, shares, strict=True):
        marks = "".join(f'<i class="at" style="left:{at(value)}"></i>' for value in (0.0, 100.0))
        bar = ""
        if share is not None:
            begin, end = sorted((0.0, share))
            bar = f'<i class="bar" style="left:{at(begin)};width:calc({at(end)} - {at(begin)});opacity:.45"></i>'
            bar += f'<i class="dot" style="left:{at(share)}"></i>'
        best = each["expert's score"]
        title = f"{each['expert']} on {each['task']}: base {each['base']}, expert {best}, merged {each['merged']}"
        rows.append(
            f'<div class="row ours" style="--c:var(--ours)" title="{_e(title)}"><span>{_e(each["expert"])}</span>'
            f'<div class="track">{marks}{bar}</div><span>{_e(each["kept"])}</span></div>'
        )
    ticks = (
        f'<b style="position:absolute;left:{at(0)}">0 %</b><b style="position:absolute;right:calc(100% - {at(100)})">'
    )
    axis = (
        f'<div class="row axis"><span></span><span style="position:relative;height:18px">{ticks}100 %</b></span></div>'
    )
    rows += [axis] if rows else []
    return "".join(rows) + (f"<details><summary>Table</summary>{table(facts.kept)}</details>" if rows else "")


def _percent(cell: str) -> float | None:
    number = cell.removesuffix("%").strip()
    return float(number) if re.fullmatch(r"-?\d+(\.\d+)?", number) else None


def _gate(facts: RunFacts) -> str:
    if facts.verdict is None:
        return ""
    lines = []
    for reason in facts.verdict.reasons:
        colour = "soft" if reason.startswith(NOTE) else "bad" if reason.endswith(": fail") else "good"
        sign = {"soft": "·", "bad": "✗", "good": "✓"}[colour]
        lines.append(f'<li><b class="{colour}">{sign}</b> {_e(reason)}</li>')
    return f'<ul class="rules" style="list-style:none;padding:0">{"".join(lines)}</ul>'


def _maps(values: Mapping[str, Mapping[str, float]], *, logarithmic: bool = False) -> str:
    """Draw a heat map for each expert, layers down and projections across, all on one colour scale."""
    grids = {expert: grid_of(each) for expert, each in values.items()}
    known = [v for _, columns in grids.values() for column in columns for v in column if math.isfinite(v) and v > 0]
    if not known:
        return ""
    low, high = (min(known), max(known)) if logarithmic else (0.0, 1.0)

    def share(value: float) -> float:
        if logarithmic:
            return 1.0 if high == low else math.log(max(value, low) / low) / math.log(high / low)
        return min(max(value, 0.0), 1.0)

    maps = "".join(_map(expert, names, columns, share) for expert, (names, columns) in grids.items())
    return (
        f'<div class="maps">{maps}</div><div class="scale">{low:.3g}<i></i>{high:.3g}'
        f"{' (logarithmic)' * logarithmic}</div>"
    )


def _map(expert: str, names: Sequence[str], columns: Sequence[Sequence[float]], share: Callable[[float], float]) -> str:
    names, columns = names[:MAX_COLUMNS], columns[:MAX_COLUMNS]
    cells = ["<span></span>", *(f"<b>{_e(name)}</b>" for name in names)]
    for layer in range(max((len(column) for column in columns), default=0)):
        cells.append(f"<span>{layer}</span>")
        for name, column in zip(names, columns, strict=True):
            value = column[layer]
            title = f"layer {layer}, {name}: {value:.3g}"
            cells.append(
                f'<i style="--v:{100 * share(value):.0f}%" title="{_e(title)}"></i>'
                if math.isfinite(value) and value >= 0
                else '<i class="none"></i>'
            )
    style = f"grid-template-columns:26px repeat({len(names)},minmax(10px,40px))"
    return f'<div><h3>{_e(expert)}</h3><div class="map" style="{style}">{"".join(cells)}</div></div>'


def _losses(facts: RunFacts) -> str:
    """Show for a rejected run which documents are lost, which experts are better there, and which layers moved most."""
    found = facts.documents
    if facts.verdict is None or facts.verdict.passed or found is None or not (rows := lost_rows(found)):
        return ""
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = "".join(f"<li>{_e(line)}</li>" for line in loss_lines(found))
    layers = f'<p class="note">{_e(LAYERS)}</p>{table(facts.layers)}' if facts.layers else ""
    return f"<ul>{lines}</ul>{table([{name: row.get(name, '') for name in columns} for row in rows])}{layers}"


def _answers(facts: RunFacts) -> str:
    if facts.documents is None:
        return ""
    rows, blocks = answer_rows(facts.documents), []
    for row in rows:
        task, prompt, expected, *answers = row.items()
        pair = "".join(
            f'<div class="{_right(answer)}"><p class="label">{_e(name)}</p><pre><code>{_e(answer)}</code></pre></div>'
            for name, answer in answers
        )
        blocks.append(
            f'<div class="sample"><span class="soft">{_e(task[1])}</span><p class="label">{_e(prompt[0])}</p>'
            f'<pre>{_e(prompt[1])}</pre><p class="label">{_e(expected[0])}</p><pre>{_e(expected[1])}</pre>'
            f'<div class="pair">{pair}</div></div>'
        )
    few, rest = blocks[:SHOWN], blocks[SHOWN:]
    differ = sum(bool(each.gain) for each in facts.documents.documents)
    note = (
        f'<p class="note">Of {len(facts.documents.documents)} documents {differ} differ in score; they come first.</p>'
    )
    hidden = f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    return note + "".join(few) + hidden if blocks else ""


def _right(answer: str) -> str:
    return {"✓": "good", "✗": "bad"}.get(answer[:1], "")


def _lineage(facts: RunFacts, more: PageFacts) -> str:
    """Draw the inputs with their commits, lines from each to the merge, and the version that was made, as SVG."""
    order = {"base": 0, "expert": 1, "rows": 2}
    inputs = sorted((c for c in facts.changes if c.now), key=lambda c: order.get(more.roles.get(c.ref, "rows"), 2))
    if not inputs:
        return ""
    height = len(inputs) * (_HEIGHT + _GAP) - _GAP
    middle = height / 2
    drawn = []
    for number, each in enumerate(inputs):
        top = number * (_HEIGHT + _GAP)
        y, new = top + _HEIGHT / 2, " moved" if each.status in ("moved", "new") and facts.champion else ""
        role = more.roles.get(each.ref, "rows")
        drawn += [
            f'<path class="{new.strip()}" d="M390 {y} C 450 {y}, 450 {middle}, 508 {middle}"/>',
            *_box(0, top, 390, each.ref, f"{role} · {_commits(each)}", new),
        ]
    drawn.append(f'<path d="M698 {middle} L 752 {middle}"/>')
    drawn += _box(508, middle - _HEIGHT / 2, 190, "merge", short(facts.digest), "")
    drawn += _box(752, middle - _HEIGHT / 2, 248, _version(facts), _outcome(facts)[1], "")
    return f'<svg class="tree" viewBox="-1 -1 1002 {height + 2}" role="img" aria-label="lineage">{"".join(drawn)}</svg>'


def _version(facts: RunFacts) -> str:
    found = re.match(r"models:/\S+", facts.outcome)
    return found[0] if found else facts.recipe


def _commits(change: Change) -> str:
    now = short(change.now or "")
    return f"{short(change.before or '')} → {now}" if change.status == "moved" else now


def _box(x: float, y: float, width: float, text: str, small: str, new: str) -> list[str]:
    letters = int((width - 20) / 7.4)
    shown = text if len(text) <= letters else f"…{text[1 - letters :]}"
    return [
        f'<g><title>{_e(text)}</title><rect class="{new.strip()}" x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" '
        f'rx="7"/><text x="{x + 11}" y="{y + 19}">{_e(shown)}</text>'
        f'<text class="small" x="{x + 11}" y="{y + 34}">{_e(small[: int(width / 6)])}</text></g>'
    ]


def _steps(steps: Sequence[StepTime]) -> str:
    if not steps:
        return ""
    whole = max(each.begin + each.seconds for each in steps) or 1.0
    shown = sorted(sorted(steps, key=lambda s: -s.seconds)[:MAX_STEPS], key=lambda s: (s.begin, s.name))
    rows = []
    for each in shown:
        left, width = 100 * each.begin / whole, 100 * each.seconds / whole
        cached, failed = each.state == "Cached", each.state in ("Failed", "Crashed", "TimedOut")
        colour, faint = ("bad" if failed else "base" if cached else "cool"), ";opacity:.5" * cached
        word = "found" if cached else f"{each.seconds:.1f} s" if each.seconds < 60 else duration(each.seconds)
        rows.append(
            f'<div class="row" style="--c:var(--{colour})"><span title="{_e(each.name)}">{_e(each.name)}</span>'
            f'<div class="track"><i class="bar" style="left:{left:.2f}%;width:{width:.2f}%{faint}"></i></div>'
            f"<span>{_e(word)}</span></div>"
        )
    axis = f'<div class="row axis"><span></span><span><b>0</b><b>{_e(duration(whole))}</b></span><span></span></div>'
    rest = f'<p class="note">The {MAX_STEPS} longest of {len(steps)}.</p>' if len(steps) > MAX_STEPS else ""
    return rest + "".join(rows) + axis


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return at least one row as an HTML table. The keys of the first row are the columns."""
    head = "".join(f"<th>{_e(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_e(row.get(name, ''))}</td>" for name in rows[0]) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def image(png: bytes, title: str) -> str:
    """Return an image element that contains a PNG file as a data URL."""
    return f'<img class="picture" alt="{_e(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
