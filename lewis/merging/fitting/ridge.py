"""`ridge: auto`: choose of a few ridges the one with the least loss of the merged model on held-out calibration rows.

The merged model is not written for that: its tensors are merged as they are read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.importance.calibration import Calibration
from lewis.merging.calibration_rows import RIDGES, split
from lewis.merging.fitting.fitted import Unwritten
from lewis.merging.fitting.held_back import Fit
from lewis.merging.fitting.losses import from_json, mean_loss, predicts_next_token, row_losses, to_json
from lewis.merging.prepared import Prepared
from lewis.methods import Parameter
from lewis.progress import Report, silent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The ridge that was chosen, and the losses that it was chosen by.

    Attributes:
        ridge: the one with the least loss; of equal ones the largest.
        losses: ridge -> nats per token on the held-out rows, the mean over the experts.
    """

    ridge: float
    losses: dict[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return the choice as plain JSON data, for the manifest of the merged model."""
        return {"ridge": self.ridge, "losses": [[ridge, to_json(loss)] for ridge, loss in self.losses.items()]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Choice:
        """Read the data that `to_json` returned."""
        return cls(data["ridge"], {ridge: from_json(loss) for ridge, loss in data["losses"]})

    def to_text(self) -> str:
        """The choice in a sentence."""
        losses = ", ".join(f"{loss:.4f} with {ridge:g}" for ridge, loss in self.losses.items())
        return f"ridge: auto chose {self.ridge:g}, by the loss on held-out calibration rows (nats per token): {losses}"


def choose(merge: Prepared, folder: Path, fit: Fit, progress: Report = silent, threads: int | None = None) -> Choice:
    """Fit the merge with each of `RIDGES` to part of the rows, and choose the ridge by the loss on the others.

    Args:
        merge: a merge with `ridge: auto`.
        folder: folder of the fitted tensors and the losses; losses that a killed process has left are kept.
        fit: fits a merge whose ridge is a number.
        progress: called with (fit, units done, units in all), in the units of `fit`, over all ridges.
        threads: by default one per core; any number gives the same choice.

    Raises:
        InputError: if the model does not predict the next token.
        LewisError: as `fit` and `mean_loss`, or if no loss is finite.
    """
    if not predicts_next_token(merge.base):
        raise InputError(
            f"{merge.base.folder}: parameters.ridge: auto goes by the loss of the next token, which this kind of "
            "model does not predict; give a number"
        )
    parts = {
        expert.ref: (expert.calibration, expert.held_back) if expert.held_back else split(expert.calibration)
        for expert in merge.experts
        if expert.calibration
    }
    judging = [parts[expert.ref][1].of_answers for expert in merge.judging]
    file = folder / "ridges.json"
    store.make_folder(folder)
    known = dict(store.read_entry(file) or {})
    for i, ridge in enumerate(RIDGES):

        def report(what: str, done: int, total: int, before: int = i) -> None:
            progress(what, before * total + done, len(RIDGES) * total)

        if str(ridge) not in known:
            candidate = with_ridge(merge, ridge, [fitted_to for fitted_to, _ in parts.values()])
            place = folder / f"ridge-{ridge:g}"
            fitted = fit(candidate, place, report, threads)
            loss = mean_loss(row_losses(Unwritten(candidate, fitted), judging, threads))
            known[str(ridge)] = to_json(loss)
            store.write_entry(file, known)
            store.discard(place)
            logger.info("ridge %g: %.4f nats per token on held-out calibration rows", ridge, loss)
        report("fit", 1, 1)
    losses = {ridge: from_json(known[str(ridge)]) for ridge in RIDGES}
    if not any(map(math.isfinite, losses.values())):
        raise LewisError("parameters.ridge: auto found no finite loss on held-out calibration rows; give a number")
    found = Choice(min(RIDGES, key=lambda ridge: losses[ridge]), losses)
    logger.info("%s", found.to_text())
    return found


def with_ridge(merge: Prepared, ridge: float, sets: Sequence[Calibration] | None = None) -> Prepared:
    """Return the same merge with a number for its ridge and, if `sets` are given, these calibration rows."""

    def number(parameter: Parameter, value: Any) -> Any:
        return ridge if parameter.name == "ridge" else value

    given: Sequence[Calibration | None] = sets or [expert.calibration for expert in merge.experts]
    pairs = zip(merge.experts, given, strict=True)
    experts = tuple(replace(expert, calibration=calibration) for expert, calibration in pairs)
    return replace(merge.with_parameters(number), experts=experts)
