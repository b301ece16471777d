"""Judge a fit on calibration rows that it has not seen, which are held back from it, and take it only if it holds.

On these rows the merged model is compared with the experts, each on its own rows, and with the anchor, which is what
the merge would be without a fit. A fit does not hold if it loses more than the anchor, or if one row loses more than a
row of a sound fit does (`STRAIN`). It is repeated with a larger ridge and prior and a smaller bound, which give the few
rows less influence. If that does not help, the anchor is taken, unless one of the fits loses no more than it, in the
mean and on the worst row.

What so few rows say has an interval, which the verdict names. A set of which fewer than `FEW` rows are held back cannot
judge: then the bound is small from the start.

The loss is that of the answers. Where the sets do not say which tokens these are, it is that of whole texts. No expert
was trained to predict prompts, so the anchor may do that better than they: there, the fit and the anchor are compared
by the KL divergence from what the experts predict.

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
    row_losses,
    to_json,
)
from lewis.merging.fitting.refine import Refined, refine
from lewis.merging.prepared import Prepared
from lewis.merging.settings import Expert
from lewis.methods import Parameter
from lewis.progress import Report

logger = logging.getLogger(__name__)
STRAIN = 1.0  # nats per token that a row of one token may lose; one of n tokens, which is less noisy, that / sqrt(n)
FEW = 4  # held-back rows of a set; fewer cannot judge
FIT = 8  # a fit takes about this many times as long as a pass over the held-back rows: its share of the progress
REFINE = 16  # and so does each epoch of the training after it
LARGER = {"ridge": (10.0, 0.1), "prior": (3.0, 3.0)}  # parameter of a second fit -> (factor, least value)
TIGHT = 2.0  # the bound of a second fit, and of one that too few rows judge

Fit = Callable[[Prepared, Path, Report, int | None], Fitted]
"""Fits a merge: takes the merge, the folder for its tensors, what reports the progress, and the threads."""


@dataclass(frozen=True)
class Distance:
    """How far a merged model is from the experts on held-back rows.

    Attributes:
        mean: nats per token above each expert on its own rows, the mean over the experts.
        worst: nats per token that the worst row is above its expert.
        experts: reference of each expert -> the mean over its rows.
        margin: half the width of the 95 % interval of `mean`, nats per token; infinite if an expert has one row only.
        strain: the largest product, over the rows, of the nats per token that one is above its expert and the square
            root of its tokens.
        divergence: KL divergence from the experts, nats per token, the mean over the experts; not in JSON. NaN if it
            was not asked for: it is where moves may be made longer, or no answers are known.
    """

    mean: float
    worst: float
    experts: dict[str, float] = field(default_factory=dict)
    margin: float = math.inf
    strain: float = math.inf
    divergence: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Return the distance as plain JSON data."""
        experts = {ref: to_json(mean) for ref, mean in self.experts.items()}
        numbers = {name: to_json(getattr(self, name)) for name in ("mean", "worst", "margin", "strain")}
        return {**numbers, "experts": experts}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Distance:
        """Read the data that `to_json` returned."""
        experts = {ref: from_json(mean) for ref, mean in data.get("experts", {}).items()}
        numbers = (from_json(data.get(name)) for name in ("margin", "strain"))  # an older version had neither
        return cls(from_json(data["mean"]), from_json(data["worst"]), experts, *numbers)

    def to_text(self) -> str:
        """The mean with its interval, and the worst row."""
        margin = f" ±{self.margin:.4f}" if math.isfinite(self.margin) else ""
        return f"{self.mean:+.4f}{margin}, the worst row {self.worst:+.2f}"


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
            f"{self.rows} held-back rows, nats per {'answer ' * self.of_answers}token from the experts: "
            f"{taken.to_text()}; without the fit {self.anchor.to_text()}"
        )
        each = [
            f"{ref} {mean:+.4f}" + (f" ({self.gains[ref]:.2f})" if ref in self.gains else "")
            for ref, mean in taken.experts.items()
        ]
        about = " (in brackets: by how much it beats the base)" * bool(self.gains)
        text += f"; by expert{about}: {', '.join(each)}" if each else ""
        text += f"; {self.length.to_text()}" if self.length and self.length.taken else ""
        text += f"; {self.refined.to_text()}" if self.refined else ""
        first = self.fits[0].to_text()
        if self.taken is None:
            return f"the fit did not hold and is left out, the anchor is taken ({first}); {text}"
        again = f"; fitted again with a larger ridge and prior and a smaller bound, since the first fit had {first}"
        return text + again * bool(self.taken)


def tightened(merge: Prepared) -> Prepared:
    """Return the merge with a bound of `TIGHT` at most, if too few held-back rows judge its fit; with a warning."""
    found = [(each, each.calibration) for each in merge.judging if each.calibration and _held(each) < FEW]
    if not merge.holds_back or not found:
        return merge
    for expert, rows in found:
        what = "prompts" if rows.prompts else "different rows"
        count = len(by_prompt(rows)) + (len(by_prompt(expert.held_back)) if expert.held_back else 0)
        logger.warning(
            "%s: %d held-back rows judge the fit to it, expected at least %d, so parameters.bound is %g at most: raise "
            "samples of lewis.calibrations.%s, which has %d %s, to %d or more of which every fourth predicts an answer",
            *(expert.ref, _held(expert), FEW, TIGHT, rows.name, count, what, FEW * EVERY),
        )
    return merge.with_parameters(_smaller)


def _held(expert: Expert) -> int:
    return len(expert.held_back.samples) if expert.held_back else 0


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
    likely = dict[Place, Likely]() if longer or not of_answers else None
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

    def is_closer(found: Distance) -> bool:
        return found.mean <= anchor.mean if of_answers else found.divergence <= anchor.divergence

    def holds(found: Distance) -> bool:
        return found.strain <= STRAIN and is_closer(found)

    def is_no_worse(found: Distance) -> bool:
        return is_closer(found) and found.worst <= anchor.worst

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
    rows = {
        ref: [
            (_number(own.nats / own.weight - expert.nats / expert.weight), own.weight)
            for own, expert in zip(merged[ref], experts[ref], strict=True)
        ]
        for ref in experts
    }
    every = [row for each in rows.values() for row in each]
    worst = max((loss for loss, _ in every), default=0.0)
    strain = max((loss * math.sqrt(weight) for loss, weight in every), default=0.0)
    means = {ref: _number(mean_loss([merged[ref]]) - mean_loss([experts[ref]])) for ref in experts}
    divergence = mean_divergence([merged[ref] for ref in experts])
    return Distance(sum(means.values()) / len(means), worst, means, _margin(list(rows.values())), strain, divergence)


def _margin(rows: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Half the width of the 95 % interval of a mean over experts of means over rows, each row by its weight.

    By Student's distribution. A weighted mean m of d_i has the variance n / (n - 1) sum w_i^2 (d_i - m)^2 / (sum w_i)^2
    (Cochran, Sampling Techniques, 1977, equation 6.13).

    Args:
        rows: of each expert, the value and the weight of each row.
    """
    from scipy.stats import t

    if any(len(each) < 2 for each in rows):
        return math.inf
    variance = 0.0
    for each in rows:
        total = sum(weight for _, weight in each)
        mean = sum(value * weight for value, weight in each) / total
        squares = sum((weight * (value - mean)) ** 2 for value, weight in each)
        variance += len(each) / (len(each) - 1) * squares / total**2
    free = sum(len(each) - 1 for each in rows)
    return _number(float(t.ppf(0.975, free)) * math.sqrt(variance) / len(rows))


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


def _smaller(parameter: Parameter, value: Any) -> Any:
    return min(value or math.inf, TIGHT) if parameter.name == "bound" else value


def _larger(parameter: Parameter, value: Any) -> Any:
    value = _smaller(parameter, value)
    if parameter.name not in LARGER:
        return value
    factor, least = LARGER[parameter.name]
    return max(factor * value, least)
