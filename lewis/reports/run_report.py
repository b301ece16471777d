"""The report of a run as Markdown (why it ran, what changed, what was computed, scores), its name and verdict line."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from shlex import quote

from lewis.evaluation.documents import SideBySide
from lewis.evaluation.gate import NOTE, Verdict
from lewis.evaluation.statistics.scored import MERGED, Scored
from lewis.evaluation.statistics.scores import Score
from lewis.models.source import commits_of
from lewis.reports.markdown import code, link, markdown_table, picture, plain
from lewis.reports.side_by_side import answers_text, losses_text

MAX_LINE = 300  # characters of a verdict line
SHORT, BRIEF = 8, 6  # characters of a commit or digest: in texts; in the name of a run
MAX_NAMED = 2  # models in the name of a run; a list of runs has no room for more
KEY = re.compile(r"(?<![0-9a-zA-Z])(?:sha256:)?([0-9a-f]{40}(?:[0-9a-f]{24})?)(?![0-9a-zA-Z])")

AWAITS = "AwaitingApproval"
"""Name of the state of a run whose version passed and waits for a person."""


@dataclass(frozen=True)
class Change:
    """An input of the merge, a model or a calibration set.

    Attributes:
        ref: its reference in the recipe.
        before: commit or digest that the champion was made of; None if the champion has no such input.
        now: commit or digest in this run; None if this run has no such input.
    """

    ref: str
    before: str | None
    now: str | None

    @property
    def status(self) -> str:
        """`unchanged`, `moved`, `new` or `removed`."""
        if self.before is None or self.now is None:
            return "new" if self.before is None else "removed"
        return "unchanged" if self.before == self.now else "moved"


@dataclass(frozen=True)
class RunFacts:
    """The facts in the report of a run.

    Attributes:
        recipe: its name.
        outcome: what came of the run, in one sentence.
        why: what started the run.
        seconds: how long it took.
        digest: of the merge, 64 hex digits.
        champion: `uri` of the version that was in use before, whose inputs are compared; None if there was none.
        changes: one per input.
        work: step -> (how many results were computed, how many were found in the cache).
        scores: label -> scores, in the order of the columns; those of the `champion` may be from the registry.
        comparison: rows of `lewis.evaluation.statistics.scored.comparison_rows`.
        kept: rows of `lewis.evaluation.statistics.retained_gain.kept_rows`.
        pictures: title -> PNG, shown inside the text.
        verdict: the gate's; None if nothing is registered.
        documents: the answers of the merged model and of the model that it is compared with; None without one.
        layers: rows of `lewis.reports.tables.moved_rows`, for the report of a run that was rejected.
        means: expert -> mean density; empty for a plain merge.
        fit: what `ridge: auto` chose and what held-back rows say of the fit, as a sentence; else empty.
        warning: what may be wrong with the calibration set of the fit, as a sentence; else empty.
        links: text -> URL.
        adapter: if the merge is a LoRA adapter, what it holds and its error, in one line; else empty.
    """

    recipe: str
    outcome: str
    why: str
    seconds: float
    digest: str
    champion: str | None = None
    changes: Sequence[Change] = ()
    work: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[Score]] = field(default_factory=dict)
    comparison: Sequence[Mapping[str, str]] = ()
    kept: Sequence[Mapping[str, str]] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    verdict: Verdict | None = None
    documents: SideBySide | None = None
    layers: Sequence[Mapping[str, str]] = ()
    means: Mapping[str, float] = field(default_factory=dict)
    fit: str = ""
    warning: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    adapter: str = ""


def to_markdown(facts: RunFacts) -> str:
    """Render the report of a run as Markdown; sections without content are left out."""
    since = f"since the champion {code(facts.champion)}" if facts.champion else "(there was no champion before)"
    compared = [{**row, "metric": code(row["metric"]), "model": code(row["model"])} for row in facts.comparison]
    means = [{"expert": code(ref), "mean density": f"{mean:.3f}"} for ref, mean in facts.means.items()]
    links = " · ".join(link(text, url) for text, url in facts.links.items())
    parts = [
        f"# Run of {code(facts.recipe)}",
        f"**{plain(facts.outcome)}**",
        f"Started {plain(facts.why)}. Took {duration(facts.seconds)}. Merge digest {code(facts.digest[:SHORT])}.",
        links,
        plain(facts.adapter),
        _section(f"What changed {since}", _changes(facts.changes)),
        _section("What was computed", _work(facts.work)),
        _section("Scores", markdown_table(score_rows(facts.scores))),
        _section("What is kept of each expert's gain", _kept(facts.kept)),
        _section("Compared, document by document", markdown_table(compared)),
        _verdict(facts.verdict),
        _section("Why it is worse", _losses(facts)),
        _section("Answers side by side", answers_text(facts.documents) if facts.documents else ""),
        _section("The fit", "\n\n".join(plain(each) for each in (facts.warning, facts.fit) if each)),
        _section("Mean density", markdown_table(means)),
        *(_section(plain(title), picture(title, png)) for title, png in facts.pictures.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def score_rows(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, str]]:
    """Return a row per task and metric: one column per model, then the merged model minus base and minus champion.

    A difference ends with ✓ if the merged model is better and with ✗ if it is worse, also where lower is better.
    """
    cells = {(s.task, s.metric, label): s for label, found in scores.items() for s in found}
    rows = []
    for task, metric in dict.fromkeys(key[:2] for key in cells):
        ours = cells.get((task, metric, MERGED))
        first = next(score for key, score in cells.items() if key[:2] == (task, metric))
        row = {"metric": f"{code(first.key)} {first.arrow}"}
        for label in scores:
            score = cells.get((task, metric, label))
            row[code(label)] = f"{score.value:.4g}" if score else "-"
        for label in ("base", "champion"):
            theirs = cells.get((task, metric, label))
            if label in scores:
                row[f"vs {label}"] = _gap(ours.value - theirs.value, first.higher_is_better) if ours and theirs else "-"
        rows.append(row)
    return rows


def score_columns(models: Sequence[Scored], champion: Mapping[str, float] | None = None) -> dict[str, Sequence[Score]]:
    """Return the columns of a score table, label -> scores, the merged model's last; models without any are left out.

    Args:
        models: everything that was scored, the merged model last.
        champion: `task/metric,filter` -> score of the champion, as the registry has it. It gets a column, without
            standard errors, if it was not scored in this run.
    """
    if not models:
        return {}
    *others, ours = models
    found: dict[str, Sequence[Score]] = {model.label: model.scores for model in others}
    if champion is not None and "champion" not in found:
        known = {s: champion.get(f"{s.task}/{s.metric}") for s in ours.scores}
        found["champion"] = [replace(s, value=v, stderr=None) for s, v in known.items() if v is not None]
    return {label: each for label, each in {**found, ours.label: ours.scores}.items() if each}


def approve_command(version: str) -> str:
    """Return the command that approves a version, `models:/<name>/<number>` or `<name>/<number>`, for a shell."""
    return f"lewis approve {quote(version.removeprefix('models:/'))}"


def outcome(version: str | None, verdict: Verdict | None, champion: str | None, *, created: bool) -> str:
    """Return the outcome of a run as a sentence.

    Args:
        version: `uri` of the version that the run registered or found registered; None if there is none.
        verdict: the gate's; None if there is none.
        champion: `uri` of the version that was in use before; None if there was none.
        created: whether this run registered the version.
    """
    if version is None or verdict is None:
        return "Merged; the recipe registers nothing."
    new = "" if created else ", registered by an earlier run,"
    if champion == version:
        return f"{version} is the champion already; nothing to promote."
    if verdict.waits:
        return f"{version}{new} passed, and waits for a person: {approve_command(version)}"
    if verdict.passed:
        return f"{version}{new} is the new champion."
    return f"{version}{new} was not promoted; " + (f"{champion} stays." if champion else "none is yet.")


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """Compare a run's inputs (reference -> commit or digest) with the champion's; inputs that are gone come last."""
    kept = set(now.values())  # perhaps under another reference: a version may have an input under several
    gone = [Change(ref, key, None) for ref, key in before.items() if ref not in now and key not in kept]
    return [Change(ref, before.get(ref), key) for ref, key in now.items()] + gone


def run_name(recipe: str, moves: Sequence[Change] | None, names: Mapping[str, str], edited: bool) -> str:
    """Return the name of a run: `alpha: math b42e10 -> 0070ea`, `alpha: recipe edited`, `alpha: nothing moved`.

    Args:
        recipe: its name.
        moves: its models, compared with those of the run before; None if there was none.
        names: reference of a model -> its short name.
        edited: whether the recipe was edited since the run before.
    """
    if moves is None:
        return f"{recipe}: first merge"
    moved = [f"{names.get(each.ref, each.ref)} {_arrow(each)}" for each in moves if each.status == "moved"]
    more = [f"{len(moved) - MAX_NAMED} more"] if len(moved) > MAX_NAMED else []
    told = [*(["recipe edited"] if edited else []), *moved[:MAX_NAMED], *more]
    return f"{recipe}: {', '.join(told) or 'nothing moved'}"


def _arrow(move: Change) -> str:
    """`b42e10 -> 0070ea` for a model that moved; if base and adapter both moved, for the adapter."""
    commits = zip(commits_of(move.before or ""), commits_of(move.now or ""), strict=False)
    before, now = ([pair for pair in commits if pair[0] != pair[1]] or [(str(move.before), str(move.now))])[-1]
    return f"{short(before)[:BRIEF]} -> {short(now)[:BRIEF]}"


def short(key: str) -> str:
    """Return a text in which each commit or digest is cut to `SHORT` characters."""
    return KEY.sub(lambda found: found[1][:SHORT], key)


def duration(seconds: float) -> str:
    """Format a number of seconds as `12 s`, `3 min 5 s` or `2 h 4 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _kept(rows: Sequence[Mapping[str, str]]) -> str:
    return markdown_table([{**row, "expert": code(row["expert"]), "task": code(row["task"])} for row in rows])


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _changes(changes: Iterable[Change]) -> str:
    def cell(key: str | None) -> str:
        return code(short(key)) if key else ""

    return markdown_table(
        [
            {
                "input": code(each.ref),
                "champion": cell(each.before),
                "now": cell(each.now),
                "": each.status if each.status == "unchanged" else f"**{each.status}**",
            }
            for each in changes
        ]
    )


def _work(work: Mapping[str, tuple[int, int]]) -> str:
    done = {step: counts for step, counts in work.items() if any(counts)}
    return markdown_table(
        [{"step": step, "computed": computed, "from the cache": cached} for step, (computed, cached) in done.items()]
    )


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    word = "passed" if verdict.passed else "failed"
    rules = "\n".join(f"* {plain(reason)}" for reason in verdict.reasons)
    return _section(f"The gate: {word}", f"Compared with {code(verdict.compared_with)}.\n\n{rules}")


def _losses(facts: RunFacts) -> str:
    rejected = facts.verdict is not None and not facts.verdict.passed
    return losses_text(facts.documents, facts.layers) if rejected and facts.documents else ""


def _gap(gap: float, higher: bool) -> str:
    mark = "" if gap == 0 else " ✓" if (gap > 0) == higher else " ✗"
    return f"{gap:+.4g}{mark}"


def verdict_line(version: str, verdict: Verdict, *, champion: str | None) -> tuple[str, str]:
    """Return the state's name and the verdict line for a run that registered its merge.

    Args:
        version: its `uri`.
        verdict: the gate's.
        champion: `uri` of the version that was in use before; None if there was none.

    Returns:
        `Promoted` and `v3: weighted/mean,none 0.981 vs 0.975`, with notes; `Rejected` and which rules failed;
        `AwaitingApproval` and what approves it; or `Completed`, if it is the champion already.
    """
    number = f"v{version.rpartition('/')[2]}"
    scored = f"{number}: {verdict.numbers}" if verdict.numbers else number
    notes = "".join(f"; {reason.removeprefix(NOTE)}" for reason in verdict.reasons if reason.startswith(NOTE))
    if not verdict.passed:
        failed = [reason.removesuffix(": fail") for reason in verdict.reasons if reason.endswith(": fail")]
        return "Rejected", _cut(f"{scored}; {'; '.join(failed)}")
    if champion == version:
        return "Completed", f"{number} is the champion already"
    if verdict.waits:
        return AWAITS, _cut(f"{scored}; passed, waits for: {approve_command(version)} --why ...")
    before = f"in place of v{champion.rpartition('/')[2]}" if champion else "the first champion"
    return "Promoted", _cut(f"{scored}; {before}{notes}")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 3]}..."
