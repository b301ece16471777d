"""Judge a fit on calibration rows that it has not seen, which are held back from it, and take it only if it holds.

On these rows the merged model is compared with the experts, each on its own rows, and with the anchor, which is what
the merge would be without a fit. A fit that loses more than the anchor, or that loses more than `BROKEN` on one row, is
repeated with a larger ridge and prior, which give the few rows less influence. If that does not help, the anchor is
taken, unless one of the fits loses no more than it, in the mean and on the worst row.

The loss is that of the answers. Where the sets do not say which tokens these are, it is that of whole texts. An anchor
that is better by this loss proves nothing, since no expert was trained to predict prompts: then only broken rows count.

Where an expert is more than an adapter of the base, the moves of a fit that is taken may be made longer
(`lewis.merging.fitting.length`).

The base's loss on the same rows shows what each expert gains. Where answers are known, a warning before the fit names
each expert that gains nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lewis.importance.calibration import EVERY
from lewis.merging.calibration_rows import by_prompt
from lewis.merging.fitting.fitted import Fitted, Unwritten
from lewis.merging.fitting.length import MOST, Length, lengthen
from lewis.merging.fitting.losses import (
    Likely,
    Place,
    RowLoss,
    from_json,
    mean_divergence,
    mean_loss,
    predicts_next_token,
    row_losses,
    to_json,
)
from lewis.merging.fitting.refine import Refined, refine
from lewis.merging.prepared import Prepared
from lewis.methods import Parameter
from lewis.progress import Report

logger = logging.getLogger(__name__)
BROKEN = 1.0  # nats per token that a row may lose
FIT = 8  # a fit takes about this many times as long as a pass over the held-back rows: its share of the progress
REFINE = 16  # and so does each epoch of the training after it
LARGER = {"ridge": (10.0, 0.1), "prior": (3.0, 3.0)}  # parameter of a second fit -> (factor, least value)

Fit = Callable[[Prepared, Path, Report, int | None], Fitted]
"""Fits a merge: takes the merge, the folder for its tensors, what reports the progress, and the threads."""


@dataclass(frozen=True)
class Distance:
    """How far a merged model is from the experts on held-back rows.

    Attributes:
        mean: nats per token above each expert on its own rows, the mean over the experts.
        worst: nats per token that the worst row is above its expert.
        experts: reference of each expert -> the mean over its rows.
        divergence: KL divergence from the experts, nats per token, the mean over the experts; not in JSON. NaN if it
            was not asked for.
    """

    mean: float
    worst: float
    experts: dict[str, float] = field(default_factory=dict)
    divergence: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Return the distance as plain JSON data."""
        experts = {ref: to_json(mean) for ref, mean in self.experts.items()}
        return {"mean": to_json(self.mean), "worst": to_json(self.worst), "experts": experts}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Distance:
        """Read the data that `to_json` returned."""
        experts = {ref: from_json(mean) for ref, mean in data.get("experts", {}).items()}
        return cls(from_json(data["mean"]), from_json(data["worst"]), experts)


@dataclass(frozen=True)
class Verdict:
    """The outcome of judging a fit on held-back rows.

    Attributes:
        rows: how many rows were held back.
        anchor: the anchor's distance.
        fits: distance of the fit, and of the second if there was one.
        taken: the index of the fit that was taken; None: the anchor was.
        of_answers: whether it is known which tokens are answers.
        gains: reference of each expert -> nats per token that it is below the base on its rows; in JSON without those
            that are not finite, and empty for a merge of an older version.
        refined: what training after the fit brought; None: there was none.
        length: how long the moves of the fit were made; None: they stayed as they were, untried.
    """

    rows: int
    anchor: Distance
    fits: tuple[Distance, ...]
    taken: int | None
    of_answers: bool = True
    gains: dict[str, float] = field(default_factory=dict)
    refined: Refined | None = None
    length: Length | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain JSON data, for the manifest of the merged model."""
        gains = {ref: gain for ref, gain in self.gains.items() if math.isfinite(gain)}
        fits = [each.to_json() for each in self.fits]
        further = {"refined": self.refined, "length": self.length}
        return asdict(self) | {
            "anchor": self.anchor.to_json(), "fits": fits, "gains": gains,
            **{name: each.to_json() if each else None for name, each in further.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """Read the data that `to_json` returned."""
        anchor, fits = Distance.from_json(data["anchor"]), tuple(map(Distance.from_json, data["fits"]))
        refined = Refined.from_json(data["refined"]) if data.get("refined") else None
        length = Length.from_json(data["length"]) if data.get("length") else None
        gains = data.get("gains") or {}
        return cls(data["rows"], anchor, fits, data["taken"], data["of_answers"], gains, refined, length)

    def to_text(self) -> str:
        """The verdict in a sentence."""
        taken = self.anchor if self.taken is None else self.fits[self.taken]
        text = (
            f"{self.rows} held-back rows: {taken.mean:+.4f} nats per {'answer ' * self.of_answers}token from the "
            f"experts, the worst row {taken.worst:+.2f}; without the fit {self.anchor.mean:+.4f}, the worst row "
            f"{self.anchor.worst:+.2f}"
        )
        each = [
            f"{ref} {mean:+.4f}" + (f" ({self.gains[ref]:.2f})" if ref in self.gains else "")
            for ref, mean in taken.experts.items()
        ]
        about = " (in brackets: by how much it beats the base)" * bool(self.gains)
        text += f"; by expert{about}: {', '.join(each)}" if each else ""
        text += f"; {self.length.to_text()}" if self.length and self.length.taken else ""
        text += f"; {self.refined.to_text()}" if self.refined else ""
        first = f"{self.fits[0].mean:+.4f}, the worst row {self.fits[0].worst:+.2f}"
        if self.taken is None:
            return f"the fit did not hold and is left out, the anchor is taken ({first}); {text}"
        again = f"; fitted again with a larger ridge and prior, since the first fit had {first}"
        return text + again * bool(self.taken)


def warn_of_unjudged(merge: Prepared) -> None:
    """Warn of each expert without held-back rows, since it has too few usable ones: nothing judges the fit to it."""
    judged = any(expert.held_back for expert in merge.judging)
    found = [(each.ref, each.calibration) for each in merge.judging if each.calibration and not each.held_back]
    found = [(ref, rows) for ref, rows in found if merge.holds_back or len(by_prompt(rows)) < EVERY]
    expected = merge.holds_back or merge.method.fits == "forward"
    if not expected or not found or not (judged or predicts_next_token(merge.base)):
        return
    for ref, rows in found:
        what = "prompts" if rows.prompts else "different rows"
        logger.warning(
            "%s: no held-back row judges the fit to it: expected at least %d %s in lewis.calibrations.%s, and that "
            "every fourth predicts an answer, got %d %s; raise samples",
            *(ref, EVERY, what, rows.name, len(by_prompt(rows)), what),
        )


def fit_and_judge(
    merge: Prepared, folder: Path, fit: Fit, progress: Report, threads: int | None
) -> tuple[Fitted, Verdict]:
    """Fit a merge, and take the fit only if it holds on the rows that were held back; train it further if asked to.

    Args:
        merge: a merge in which at least one of the experts that judge it has held-back rows.
        folder: folder of the fitted tensors; those that a killed process has left there are not fitted again.
        fit: fits a merge.
        progress: as that of `fit`; the passes over held-back rows count, too.
        threads: by default one per core; any number gives the same bytes.

    Returns:
        The fitted tensors, none if the anchor is taken, and the verdict.

    Raises:
        LewisError: as `fit`, `row_losses` and `refine`.
    """
    sets = {expert.ref: expert.held_back.of_answers for expert in merge.judging if expert.held_back}
    of_answers = all(each.weights is not None for each in sets.values())
    models = {expert.ref: expert.model for expert in merge.experts}
    longer = MOST if merge.may_lengthen else 0
    further = REFINE * merge.refine.epochs + 1 if merge.refine else 0
    part = partial(_part, progress, 5 + FIT + longer + further)
    likely = dict[Place, Likely]() if longer else None
    whole = list(sets.values())

    def of_expert(ref: str, number: int) -> list[RowLoss]:
        own = [rows if i == number else rows.part([]) for i, rows in enumerate(whole)]
        return row_losses(models[ref], own, threads, part(number / len(own), 1 / len(own)), note=likely)[number]

    experts = {ref: of_expert(ref, number) for number, ref in enumerate(sets)}
    gains = _gains(row_losses(merge.base, whole, threads, part(1, 1)), experts)
    if of_answers:
        _warn_of_no_gain(gains)

    def distance(model: Unwritten, begin: float, width: float = 1.0) -> Distance:
        found = row_losses(model, whole, threads, part(begin, width), experts=likely)
        return _distance(dict(zip(sets, found, strict=True)), experts)

    def holds(found: Distance) -> bool:
        return found.worst <= BROKEN and (found.mean <= anchor.mean or not of_answers)

    def is_no_worse(found: Distance) -> bool:
        return found.mean <= anchor.mean and found.worst <= anchor.worst

    def still_holds(after: Distance, before: Distance) -> bool:
        return holds(after) or (is_no_worse(after) and not holds(before))

    anchor, fits, fitted = distance(Unwritten(merge), 2), list[Distance](), list[Fitted]()
    candidates = (merge, merge.with_parameters(_larger))
    for number, candidate in enumerate(candidates):
        begin, unit = (4 + FIT, 1 / (FIT + 1)) if number else (3, 1)  # a second fit, which is rare, has little room
        fitted.append(fit(candidate, folder / f"fit-{number}", part(begin, unit * FIT), threads))
        fits.append(distance(Unwritten(candidate, fitted[-1]), begin + unit * FIT, unit))
        if holds(fits[-1]):
            break
    better = [i for i, each in enumerate(fits) if is_no_worse(each)]
    taken = len(fits) - 1 if holds(fits[-1]) else min(better, key=lambda i: fits[i].mean, default=None)
    length = refined = None
    if merge.may_lengthen and taken is not None:
        candidate, before, steps = candidates[taken], fits[taken], [fits[taken]]

        def judge(found: Fitted) -> float | None:
            steps.append(distance(Unwritten(candidate, found), 4 + FIT + len(steps)))
            return steps[-1].divergence if still_holds(steps[-1], before) else None

        fitted[taken], length = lengthen(candidate, fitted[taken], before.divergence, judge)
        fits[taken] = steps[length.taken]
    if merge.refine and taken is not None:
        begin = 5 + FIT + longer
        trained, refined = refine(candidates[taken], fitted[taken], part(begin, further - 1), threads)
        if refined and refined.taken:
            after = distance(Unwritten(candidates[taken], trained), begin + further - 1)
            if still_holds(after, fits[taken]):
                fitted[taken], fits[taken] = trained, after
            else:
                refined = replace(refined, taken=0)
    rows = sum(map(len, experts.values()))
    verdict = Verdict(rows, anchor, tuple(fits), taken, of_answers, gains, refined, length)
    logger.log(logging.INFO if holds(fits[-1]) else logging.WARNING, "%s", verdict.to_text())
    return Fitted(folder / "anchor") if taken is None else fitted[taken], verdict


def _part(progress: Report, whole: float, begin: float, width: float) -> Report:
    """Make the report of one part of the work, which reports its progress as a share of the `whole`.

    The parts: experts, base, anchor, the fit (`FIT` times as long as each other part), its result, a second fit, steps
    to longer moves, the training after it (`REFINE` times for each epoch) and its result.
    """

    def report(_: str, done: int, total: int) -> None:
        progress("fit", round(1000 * (begin + width * done / max(total, 1))), round(1000 * whole))

    return report


def _distance(merged: Mapping[str, Sequence[RowLoss]], experts: Mapping[str, Sequence[RowLoss]]) -> Distance:
    pairs = [pair for ref in experts for pair in zip(merged[ref], experts[ref], strict=True)]
    worst = max((_number(own.nats / own.weight - expert.nats / expert.weight) for own, expert in pairs), default=0.0)
    each = {ref: _number(mean_loss([merged[ref]]) - mean_loss([experts[ref]])) for ref in experts}
    return Distance(sum(each.values()) / len(each), worst, each, mean_divergence([merged[ref] for ref in experts]))


def _number(loss: float) -> float:
    """Make a loss comparable: NaN, which a model gives if its numbers overflow, becomes infinite."""
    return math.inf if math.isnan(loss) else loss


def _gains(base: Sequence[Sequence[RowLoss]], experts: Mapping[str, Sequence[RowLoss]]) -> dict[str, float]:
    pairs = zip(experts.items(), base, strict=True)
    return {ref: mean_loss([of_base]) - mean_loss([own]) for (ref, own), of_base in pairs}


def _warn_of_no_gain(gains: Mapping[str, float]) -> None:
    for ref in (ref for ref, gain in gains.items() if gain <= 0):
        logger.warning(
            "%s: on its held-back rows it is no better than the base (%+.4f nats per token); expected rows of what it "
            "was trained for: give it another calibration set, or leave it out",
            *(ref, gains[ref]),
        )


def _larger(parameter: Parameter, value: Any) -> Any:
    if parameter.name not in LARGER:
        return value
    factor, least = LARGER[parameter.name]
    return max(factor * value, least)
