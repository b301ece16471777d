"""Whether each expert knows its calibration rows better than the base does: what a fit to these rows relies on.

A look at a few rows, before anything is merged. The fit itself names an expert that does not, by its held-back rows.
"""

from __future__ import annotations

from contextlib import suppress

from lewis.errors import LewisError
from lewis.importance.calibration import Calibration
from lewis.inspection.kinds import Finding
from lewis.merging.step import MergeInput
from lewis.models.source import ModelFiles

FEW = 4  # rows of each set, on which a pass costs a few percent of the fit


def row_findings(given: MergeInput) -> list[Finding]:
    """A finding for each expert whose loss on some rows of its set is not below the base's.

    Args:
        given: of a merge. Nothing is checked if it fits no rows, its models do not predict the next token, or they
            have vocabularies of their own, as rows are the base's token ids. Nor are rows that predict nothing.
    """
    if given.base is None or not given.sets or given.config.vocabulary is not None:
        return []
    from lewis.merging.fitting.losses import predicts_next_token  # brings torch with it

    if not predicts_next_token(given.base.open()):
        return []
    rows = {ref: _few(entry.load()) for ref, entry in given.sets.items()}
    experts = [each for each in given.experts if rows.get(each.ref) and each.key != given.base.key]
    found = list[Finding]()
    with suppress(LewisError):  # a model that does not run its blocks in one order: the fit says so
        base = dict(zip(rows, _losses(given.base, list(rows.values())), strict=True))
        for expert in experts:
            its = rows[expert.ref]
            if not its.predicts:
                continue
            [own] = _losses(expert, [its])
            if own >= base[expert.ref]:
                per = "token" if its.weights is None else "answer token"
                what = f"on {len(its.samples)} rows of `{its.name}` its loss is {own:.3f} nats per {per}"
                found.append(Finding("calibration", expert.ref, f"{what}, the base's {base[expert.ref]:.3f}"))
    return found


def _few(rows: Calibration) -> Calibration:
    return rows.part(range(min(FEW, len(rows.samples)))).of_answers


def _losses(files: ModelFiles, sets: list[Calibration]) -> list[float]:
    """Nats per token of each set, or per answer token where it says which they are."""
    from lewis.merging.fitting.losses import mean_loss, row_losses

    return [mean_loss([each]) for each in row_losses(files.open(), sets)]
