"""Check that each expert predicts its calibration rows better than the base does; a fit to these rows relies on it.

Only a few rows are used, before anything is merged. The fit itself reports such an expert by its held-back rows.
"""

from __future__ import annotations

from contextlib import suppress

from lewis.errors import LewisError
from lewis.importance.calibration import Calibration
from lewis.inspection.kinds import Finding
from lewis.merging.step import MergeInput
from lewis.models.source import ModelFiles

FEW = 4  # rows of each set; a pass over so few costs a few percent of the fit


def row_findings(given: MergeInput) -> list[Finding]:
    """Return a finding for each expert whose loss on some rows of its calibration set is not below the base's.

    Args:
        given: input of a merge. Nothing is checked if it fits no rows, its models do not predict the next token, or
            they have differing vocabularies, as rows are the base's token ids; nor are sets that predict nothing.
    """
    if given.base is None or not given.sets or given.config.vocabulary is not None:
        return []
    from lewis.merging.fitting.losses import predicts_next_token  # brings torch with it

    if not predicts_next_token(given.base.open()):
        return []
    chosen = {ref: _few(entry.load()) for ref, entry in given.sets.items()}
    rows = {ref: few for ref, few in chosen.items() if few.samples}
    experts = [each for each in given.experts if each.ref in rows and each.key != given.base.key]
    found = list[Finding]()
    with suppress(LewisError):  # a model does not run its blocks in one order; the fit reports it
        base = dict(zip(rows, _losses(given.base, list(rows.values())), strict=True))
        for expert in experts:
            its = rows[expert.ref]
            [own] = _losses(expert, [its])
            if own >= base[expert.ref]:
                per = "token" if its.weights is None else "answer token"
                what = f"on {len(its.samples)} rows of `{its.name}` its loss is {own:.3f} nats per {per}"
                found.append(Finding("calibration", expert.ref, f"{what}, the base's {base[expert.ref]:.3f}"))
    return found


def _few(rows: Calibration) -> Calibration:
    """The first rows that predict something."""
    answers = rows.of_answers
    return answers.part([i for i in range(len(rows.samples)) if answers.part([i]).predicts][:FEW])


def _losses(files: ModelFiles, sets: list[Calibration]) -> list[float]:
    """Return a model's loss on each set, in nats per token, or per answer token if the set marks answers."""
    from lewis.merging.fitting.losses import mean_loss, row_losses

    return [mean_loss([each]) for each in row_losses(files.open(), sets)]
