"""The status as text for a terminal: tables, short commits, and times such as `3 min ago`."""

import io
from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lewis.reports.run_report import short
from lewis_flows.service.status_data import Input, Run, Status, Watched


def as_text(status: Status, now: datetime, width: int = 120) -> str:
    """Return the status as tables of `width` characters; times are relative to `now`, UTC, and in the local zone."""
    output = io.StringIO()
    console = Console(file=output, width=width)
    for title, table in _sections(status, now):
        console.print(Text(title), style="bold")
        console.print(table if isinstance(table, Table) else Text(f"  {table}"))
        console.print()
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines()) + "\n"


def _sections(status: Status, now: datetime) -> Iterator[tuple[str, Table | str]]:
    yield "Service", _table((), [(part.name, part.url, part.state) for part in status.parts])
    runs = {"Running": status.running, "Next": status.scheduled, "Last finished": status.finished}
    for title, listed in runs.items():
        if listed is None:
            yield title, f"unknown: {status.unknown.get('runs', '')}"
        else:
            yield title, _runs(listed, now) if listed else "nothing"
    if status.devices:
        words = {True: "holds one", False: "waits"}
        rows = [(each.what, words[each.holds], moment(each.since, now)) for each in status.devices]
        yield "Devices", _table(("task", "", "since"), rows)
    if status.polled:
        about = status.polled.problems.get("") or f"at {status.polled.checked} recipes"
        yield "Releases", f"last looked {moment(status.polled.time, now)}: {about}"
    if status.recipes is None:
        yield "Recipes", f"unknown: {status.unknown.get('recipes', '')}"
    elif not status.recipes:
        yield "Recipes", "none in the folder of recipes"
    for recipe in status.recipes or []:
        yield _heading(recipe), _recipe(recipe, now)


def _runs(runs: Sequence[Run], now: datetime) -> Table:
    rows = []
    for run in runs:
        what = f"{run.name} ({run.deployment})" if run.deployment else run.name
        when = moment(run.since, now) if run.since else ""
        rows.append((run.recipe, what, run.state, when, run.message))
    columns = ("recipe", "run", "state", "when", "message")
    kept = 5 if any(run.message for run in runs) else 4
    return _table(columns[:kept], [row[:kept] for row in rows])


def _heading(recipe: Watched) -> str:
    if not recipe.registered:
        paused = "; paused" if recipe.paused else ""
        return f"Recipe {recipe.recipe}" + ("" if recipe.unknown else f": registers nothing{paused}")
    unknown = any(line.startswith("the champion: ") for line in recipe.unknown)
    none = f"no champion now, version {recipe.lost} was the last" if recipe.lost else "no champion yet"
    champion = f"champion version {recipe.champion}" if recipe.champion else none
    if recipe.waiting:
        champion += f"; version {recipe.waiting} waits for `lewis approve`"
    state = ("; paused" if recipe.paused else "") + ("; broken" if recipe.broken else "")
    return f"Recipe {recipe.recipe}: {recipe.registered}, {'champion unknown' if unknown else champion}{state}"


def _recipe(recipe: Watched, now: datetime) -> Table:
    rows = [(each.ref, short(each.held) if each.held else "", _news(each)) for each in recipe.inputs]
    table = _table(("model", "champion holds", "now"), rows)
    if recipe.behind_since:
        table.add_row(Text("behind since"), Text(""), Text(moment(recipe.behind_since, now)))
    if recipe.unmerged:
        table.add_row(Text("not merged"), Text(""), Text("no run has merged what its file says now"))
    if attempt := recipe.attempt(now):
        when = recipe.next_attempt if recipe.next_attempt and recipe.next_attempt > now else None
        shown = f"{moment(when, now)}, since the last merge failed" if when else attempt
        table.add_row(Text("next attempt"), Text(""), Text(shown))
    if recipe.scores:
        (first, *_), (last, value) = recipe.scores, list(recipe.scores.items())[-1]
        line = f"{sparkline(list(recipe.scores.values()))}  versions {first} to {last}, the last {value:.4g}"
        table.add_row(Text("scores"), Text(""), Text(line))
    for line in recipe.served:
        table.add_row(Text("in service"), Text(""), Text(line))
    for line in recipe.unknown:
        table.add_row(*(Text(cell) for cell in ("unknown", "", line)))
    return table


def _news(model: Input) -> str:
    if model.head is None:
        return "unknown"
    if model.held is None:
        return short(model.head)
    return "the same" if model.held == model.head else f"newer: {short(model.head)}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, show_header=bool(columns), header_style="dim", padding=(0, 2))
    for name in columns or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name with brackets is no markup
    return table


def sparkline(values: Sequence[float]) -> str:
    """Numbers as bars of one character each."""
    bars, low, high = "▁▂▃▄▅▆▇█", min(values), max(values)
    if low == high:
        return "▄" * len(values)
    return "".join(bars[round((len(bars) - 1) * (value - low) / (high - low))] for value in values)


def moment(when: datetime, now: datetime) -> str:
    """A time as `in 5 min (14:05)` or `3 min ago (13:57)`, in the local time zone."""
    seconds = (when - now).total_seconds()
    size = abs(seconds)
    units = ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h"))
    count, unit = next(((size / each, name) for limit, each, name in units if size < limit), (size / 86400, "days"))
    local = when.astimezone()
    clock = f"{local:%H:%M}" if local.date() == now.astimezone().date() else f"{local:%Y-%m-%d %H:%M}"
    return f"in {count:.0f} {unit} ({clock})" if seconds > 0 else f"{count:.0f} {unit} ago ({clock})"
