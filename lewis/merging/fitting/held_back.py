"""A fit is believed only if it holds on rows that it has not seen: a part of the calibration rows is held back for it.

On these rows the merged model stands beside the experts, each on its own rows, and beside the anchor, which is what the
merge would be without a fit. A fit that loses more than the anchor, or that loses more than `BROKEN` on one row, is
repeated with a larger ridge and prior, which leave less to the few rows; if that does not help, the anchor is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lewis.merging.fitting.fitted import Fitted, Unwritten
from lewis.merging.fitting.losses import RowLoss, mean_loss, row_losses
from lewis.merging.prepared import Prepared
from lewis.methods import Parameter
from lewis.progress import Report

logger = logging.getLogger(__name__)
BROKEN = 1.0  # nats per token that a row may lose
LARGER = {"ridge": (10.0, 0.1), "prior": (3.0, 3.0)}  # parameter -> its factor, and the least value, of a second fit

Fit = Callable[[Prepared, Path, Report | None, int | None], Fitted]
"""Fits a merge: takes the merge, the folder for its tensors, what reports the progress, and the threads."""


@dataclass(frozen=True)
class Distance:
    """How far a merged model is from the experts on held-back rows.

    Attributes:
        mean: nats per token above each expert on its own rows, the mean over the experts.
        worst: of the row that loses most.
    """

    mean: float
    worst: float


@dataclass(frozen=True)
class Verdict:
    """What the held-back rows say of a merge that is fitted.

    Attributes:
        rows: how many were held back.
        anchor: the anchor's distance.
        fits: of the fit, and of the second if there was one.
        taken: the index of the fit that was taken; None: the anchor was.
    """

    rows: int
    anchor: Distance
    fits: tuple[Distance, ...]
    taken: int | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, for the manifest of the merged model."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """What `to_json` gave."""
        anchor, fits = Distance(**data["anchor"]), tuple(Distance(**each) for each in data["fits"])
        return cls(data["rows"], anchor, fits, data["taken"])

    def to_text(self) -> str:
        """A sentence."""
        taken = self.anchor if self.taken is None else self.fits[self.taken]
        text = (
            f"{self.rows} held-back rows: {taken.mean:+.4f} nats per token from the experts, the worst row "
            f"{taken.worst:+.2f}; without the fit {self.anchor.mean:+.4f}, the worst row {self.anchor.worst:+.2f}"
        )
        first = f"{self.fits[0].mean:+.4f}, the worst row {self.fits[0].worst:+.2f}"
        if self.taken is None:
            return f"the fit did not hold and is left out, the anchor is taken ({first}); {text}"
        again = f"; fitted again with a larger ridge and prior, since the first fit had {first}"
        return text + again * bool(self.taken)


def is_needed(merge: Prepared) -> bool:
    """Whether rows are held back that can judge the fit: of a model that predicts the next token."""
    from lewis.importance.measure import network_of

    if not any(expert.held_back for expert in merge.experts):
        return False
    network = network_of(merge.base)
    return not (network.encodes or network.looks_ahead)


def fit_and_judge(
    merge: Prepared, folder: Path, fit: Fit, progress: Report | None = None, threads: int | None = None
) -> tuple[Fitted, Verdict]:
    """Fit a merge, and take the fit only if it holds on the rows that were held back.

    Args:
        merge: some of whose experts have rows that were held back.
        folder: for what is fitted; what a killed process has fitted there is found again.
        fit: fits a merge.
        progress: as that of `fit`.
        threads: by default one per core; any number gives the same bytes.

    Returns:
        What was fitted, nothing if the anchor is taken; and why.

    Raises:
        LewisError: as `fit` and `row_losses`.
    """
    judged = [expert for expert in merge.experts if expert.held_back]
    sets = [expert.held_back for expert in judged if expert.held_back]
    experts = [row_losses(e.model, [rows], threads)[0] for e, rows in zip(judged, sets, strict=True)]
    anchor = _distance(row_losses(Unwritten(merge), sets, threads), experts)
    fits = list[Distance]()
    for number, candidate in enumerate((merge, _with_larger(merge))):
        fitted = fit(candidate, folder / f"fit-{number}", progress, threads)
        fits.append(_distance(row_losses(Unwritten(candidate, fitted), sets, threads), experts))
        if fits[-1].mean <= anchor.mean and fits[-1].worst <= BROKEN:
            verdict = Verdict(sum(map(len, experts)), anchor, tuple(fits), number)
            logger.info("%s", verdict.to_text())
            return fitted, verdict
    verdict = Verdict(sum(map(len, experts)), anchor, tuple(fits), None)
    logger.warning("%s", verdict.to_text())
    return Fitted(folder / "anchor"), verdict


def _distance(merged: Sequence[Sequence[RowLoss]], experts: Sequence[Sequence[RowLoss]]) -> Distance:
    pairs = [pair for each in zip(merged, experts, strict=True) for pair in zip(*each, strict=True)]
    worst = max((own.nats / own.weight - expert.nats / expert.weight for own, expert in pairs), default=0.0)
    return Distance(mean_loss(merged) - mean_loss(experts), worst)


def _with_larger(merge: Prepared) -> Prepared:
    value = merge.settings.value

    def larger(parameter: Parameter, *where: Any) -> Any:
        factor, least = LARGER.get(parameter.name, (1.0, None))
        given = value(parameter, *where)
        return given if least is None else max(factor * given, least)

    return replace(merge, settings=replace(merge.settings, value=larger))
