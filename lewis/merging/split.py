"""Which calibration rows `ridge: auto` fits to, and which it holds out to judge the fit by."""

from lewis.errors import InputError
from lewis.importance.calibration import Calibration

EVERY = 4  # of so many rows, the last is held out


def split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """The rows to fit to, and those that are held out: every fourth, or of fewer than four rows the last."""
    rows = calibration.samples
    held = range(EVERY - 1, len(rows), EVERY) if len(rows) >= EVERY else range(len(rows) - 1, len(rows))
    fitted_to = tuple(row for i, row in enumerate(rows) if i not in held)
    return Calibration(calibration.name, fitted_to), Calibration(calibration.name, tuple(rows[i] for i in held))


def check(expert: str, calibration: Calibration) -> None:
    """Check that a set can be split and has tokens to predict.

    Raises:
        InputError: naming the expert and its set.
    """
    fitted_to, held = split(calibration)
    if not fitted_to.samples or max(map(len, held.samples)) < 2:
        raise InputError(
            f"{expert}: parameters.ridge: auto holds out every fourth row of the calibration set {calibration.name!r}, "
            f"which has {len(calibration.samples)} rows; give it more rows of two tokens or more, or give a number"
        )
