"""The page of all recipes: each one's champion, scores over versions, since when it is behind, last verdict, next run.

The page is an HTML file (`lewis status --html`), and an artifact in Prefect. The artifact is updated at the end of a
merge, and by the receiver: after a recipe was deployed, after a champion moved on its store, and after a poll that
found a change, such as a champion that was moved elsewhere.
"""

import html
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from prefect import Flow, State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactCollectionFilter
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

from lewis.reports.markdown import code, markdown_table, plain
from lewis_flows.prefect_runs import MERGE
from lewis_flows.service import recipe_deployments
from lewis_flows.service.status import status
from lewis_flows.service.status_data import FAILURES, Run, Status, Watched
from lewis_flows.service.status_text import sparkline

logger = logging.getLogger(__name__)
KEY = "recipes"  # the key of the artifact
_WIDTH, _HEIGHT = 160, 32  # size of the line chart of scores, in pixels
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222;background:#fff}
table{border-collapse:collapse}th,td{padding:.4rem 1.2rem .4rem 0;text-align:left;vertical-align:top}
tr{border-bottom:1px solid #ddd}.bad{color:#b00020}.wait{color:#8a5a00}small{color:#666}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}tr{border-color:#444}.bad{color:#ff8a80}
.wait{color:#ffca66}small{color:#aaa}}
"""


class Row(NamedTuple):
    """The row of one recipe on the page; its texts are for people, and empty if there is nothing to say."""

    recipe: str
    champion: str
    behind: str
    verdict: str
    message: str
    next: str
    scores: dict[int, float]
    wrong: bool


def rows(found: Status) -> Iterator[Row]:
    """Yield the row of each recipe in a status."""
    last = {run.recipe: run for run in found.last_runs() if run.flow == MERGE}
    for recipe in found.recipes or []:
        run = last.get(recipe.recipe)
        verdict = f"{run.state}, {_clock(run.since)}" if run and run.since else ""
        yield Row(
            recipe=recipe.recipe,
            champion=_champion(recipe),
            behind=f"since {_clock(recipe.behind_since)}" if recipe.behind_since else "",
            verdict=verdict,
            message=run.message.partition("\n")[0] if run else "",
            next=_next(recipe, [*(found.running or []), *(found.scheduled or [])]),
            scores=recipe.scores,
            wrong=recipe.broken or bool(run and run.state in FAILURES),
        )


def _champion(recipe: Watched) -> str:
    none = "none now" if recipe.lost else "none yet"
    named = f"{recipe.registered} version {recipe.champion}" if recipe.champion else none
    waits = f"; version {recipe.waiting} waits for approval" if recipe.waiting else ""
    broken = "; the recipe is broken" if recipe.broken else ""
    return (named if recipe.registered else "registers nothing") + waits + broken


def _next(recipe: Watched, runs: Sequence[Run]) -> str:
    mine = [run for run in runs if run.recipe == recipe.recipe and run.flow == MERGE]
    going = [run.state for run in mine if run.state not in ("Scheduled", "Late")]
    times = [run.since for run in mine if run.state == "Scheduled" and run.since]
    times += [recipe.next_attempt] if recipe.next_attempt else []
    return going[0] if going else _clock(min(times)) if times else ""


def _clock(time: datetime | None) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}" if time else ""


def as_markdown(found: Status, now: datetime) -> str:
    """Render the page as Markdown, for the artifact in Prefect."""
    table = [
        {
            "recipe": code(row.recipe),
            "champion": _text(row.champion),
            "score over versions": _scores(row.scores),
            "behind": row.behind,
            "last verdict": _text(" ".join(filter(None, (row.verdict, row.message)))),
            "next run": row.next,
        }
        for row in rows(found)
    ]
    return f"# Recipes\n\n{markdown_table(table) or 'none'}\n\nAs of {_clock(now)}, {now.astimezone():%Z}.\n"


def _text(text: str) -> str:
    """Escape a text for a cell, except `|`, which `markdown_table` escapes."""
    return plain(text).replace("\\|", "|")


def _scores(scores: dict[int, float]) -> str:
    values = list(scores.values())
    return f"{sparkline(values)} {values[-1]:.4g}" if values else ""


def as_html(found: Status, now: datetime) -> str:
    """Render the page as one HTML file that loads no other file."""
    head = "".join(f"<th>{name}" for name in ("recipe", "champion", "score", "behind", "last verdict", "next run"))
    lines = []
    for row in rows(found):
        recipe, champion, behind, verdict, message, next_ = map(html.escape, row[:6])
        ended = f"<td{' class=bad' if row.wrong else ''}>{verdict}<br><small>{message}</small>"
        lines.append(
            f"<tr><td>{recipe}<td>{champion}<td>{_picture(row.scores)}<td class=wait>{behind}{ended}<td>{next_}\n"
        )
    wrong = [f"{what}: {why}" for what, why in found.unknown.items()]
    wrong += [f"{part.name} {part.state}" for part in found.parts if not part.up]
    told = "".join(f"<p class=bad>{html.escape(text)}</p>" for text in wrong)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Recipes</title><style>{_STYLE}</style>"
        f"<h1>Recipes</h1>{told}<table><tr>{head}\n{''.join(lines)}</table>"
        f"<p><small>As of {_clock(now)}, {now.astimezone():%Z}</small></html>\n"
    )


def _picture(scores: dict[int, float]) -> str:
    """Scores over versions as a line in SVG, the last one as a dot with its number."""
    if not scores:
        return ""
    low, high, first, last = min(scores.values()), max(scores.values()), min(scores), max(scores)

    def place(version: int, value: float) -> tuple[float, float]:
        x = (version - first) / (last - first) if last > first else 1.0
        y = (value - low) / (high - low) if high > low else 0.5
        return 3 + x * (_WIDTH - 6), 3 + (1 - y) * (_HEIGHT - 6)

    points = [place(*each) for each in scores.items()]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    title = f"versions {first} to {last}: {low:.4g} to {high:.4g}"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{title}</title>'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="currentColor"/></svg> {scores[last]:.4g}'
    )


def keep(flow: Flow[..., Any] | None = None, flow_run: FlowRun | None = None, state: State[Any] | None = None) -> None:
    """Update the page in Prefect, and the links to champions on the pages of the recipes' deployments.

    It can be a hook of a flow. A failure is logged, not raised. The Hub is not asked for the newest commits: the page
    shows what the last poll saw.
    """
    try:
        found = status(hub=False, scores=True)
        with get_client(sync_client=True) as client:
            _put(client, as_markdown(found, datetime.now(UTC)), new=bool(found.recipes))
            champions = {
                each.recipe: (each.registered, each.champion or "")
                for each in found.recipes or []
                if each.champion or not each.unknown  # else it is unknown whether there is a champion
            }
            recipe_deployments.name_champions(client, champions)
    except Exception as error:  # whatever is wrong, the run has done its work
        what = "the page of all recipes, or a link to a champion, stays as it is"
        logger.warning("%s: %s: %s", what, type(error).__name__, error)


def after(hooks: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the hooks of a flow with `keep` added for each way in which a run can end."""
    endings = ("on_completion", "on_failure", "on_crashed", "on_cancellation")
    return {**hooks, **{ending: [*hooks.get(ending, ()), keep] for ending in endings}}


def _put(client: SyncPrefectClient, text: str, *, new: bool) -> None:
    wanted = ArtifactCollectionFilter.model_validate({"key": {"any_": [KEY]}})
    for known in client.read_latest_artifacts(artifact_filter=wanted):
        try:
            client.update_artifact(known.latest_id, ArtifactUpdate(data=text))
            return
        except ObjectNotFound:  # somebody deleted it
            continue
    if not new:
        return
    about = "Champion, scores, last verdict and next run of each recipe"
    client.create_artifact(ArtifactCreate(key=KEY, type="markdown", data=text, description=about))
