"""The calibration rows of a fit: which of them are held out to judge it, and warnings about too few of them."""

import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate

from lewis.errors import InputError
from lewis.importance.calibration import EVERY, Calibration

logger = logging.getLogger(__name__)

RIDGES = (1.0, 0.1, 0.01, 0.001)  # the values that `ridge: auto` tries
MOST = 16  # rows of a set that are held back to judge a fit; more only if they continue the same prompt


def by_prompt(calibration: Calibration) -> list[list[int]]:
    """Indices of the rows that continue the same prompt, for each prompt; else of the rows that are the same.

    A fit that has seen a prompt, or a row, is not judged by it.
    """
    found = dict[object, list[int]]()
    for row, prompt in enumerate(calibration.prompts or calibration.samples):
        found.setdefault(prompt, []).append(row)
    return list(found.values())


def split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Split a set into rows to fit to and rows that `ridge: auto` holds out: every fourth, or the last of fewer.

    Of rows that an expert has written, it is all rows of every fourth prompt.
    """
    prompts = by_prompt(calibration)
    return _parts(calibration, prompts[EVERY - 1 :: EVERY] or prompts[-1:])


def _parts(calibration: Calibration, held: Sequence[Sequence[int]]) -> tuple[Calibration, Calibration]:
    chosen = {i for rows in held for i in rows}
    others = (i for i in range(len(calibration.samples)) if i not in chosen)
    return calibration.part(others), calibration.part(sorted(chosen))


def hold_back(calibration: Calibration) -> tuple[Calibration, Calibration | None]:
    """Split a set into rows to fit to and rows that are held back to judge the fit: every fourth, at most `MOST`.

    Of rows that an expert has written, it is all rows of every fourth prompt, until they are `MOST` or more.

    Returns:
        The two parts. The whole set and None if it has fewer than four rows (or prompts), no token to predict in
        held-back rows (no token of an answer, where the set marks these), or no token that counts in the others.
    """
    fourth = by_prompt(calibration)[EVERY - 1 :: EVERY]
    before = accumulate(map(len, fourth), initial=0)
    held = [rows for rows, count in zip(fourth, before, strict=False) if count < MOST]
    fitted_to, back = _parts(calibration, held)
    return (fitted_to, back) if fitted_to.has_weight and back.of_answers.predicts else (calibration, None)


def check_split(expert: str, calibration: Calibration) -> None:
    """Check that a set can be split into rows that count and rows that hold tokens to predict.

    Raises:
        InputError: naming the expert and its set.
    """
    fitted_to, held = split(calibration)
    if not fitted_to.has_weight or not held.of_answers.predicts:
        of = f" of {len(by_prompt(calibration))} prompts" if calibration.prompts else ""
        raise InputError(
            f"{expert}: parameters.ridge: auto holds out every fourth row of the calibration set {calibration.name!r}, "
            f"which has {len(calibration.samples)} rows{of}: expected rows to fit to, and answers to predict in those; "
            "give it more rows of two tokens or more, with answers, or give a number"
        )


def shared_set_warning(first: str, chosen: Mapping[str, str | None]) -> str:
    """A warning about experts that are fitted to the first calibration set because they name none; empty if none are.

    It is empty, too, if only one expert uses that set.

    Args:
        first: name of the first calibration set.
        chosen: expert -> the set that it names; None if it names none.
    """
    silent = [expert for expert, name in chosen.items() if not name]
    if not silent or sum((name or first) == first for name in chosen.values()) < 2:
        return ""
    return (
        f"{' and '.join(silent)} {'names' if len(silent) == 1 else 'name'} no calibration set, so the fit takes the "
        f"rows of {first!r}, which several share; rows of another domain spoil a fit: give each expert rows like "
        "those of its own training in lewis.calibrations, and name them in models[].calibration"
    )


def warn_of_few_tokens(expert: str, seen: Mapping[str, tuple[int, int]]) -> None:
    """Warn if projections saw no token, or fewer than they have inputs; the fit is stable, but may not hold elsewhere.

    Args:
        expert: the expert whose calibration set it is.
        seen: name of a projection -> how many tokens reached it, and how many inputs it has (or 0, if unknown).
    """
    unseen = [name for name, (tokens, _) in seen.items() if not tokens]
    if unseen:
        logger.warning(
            "%s: no token of its calibration set reached %d of %d projections, such as %s: they are fitted to the "
            "other experts, or are the sum of the task vectors if those have seen none either; raise samples",
            *(expert, len(unseen), len(seen), unseen[0]),
        )
    few = {name: (tokens, size) for name, (tokens, size) in seen.items() if 0 < tokens < size}
    if few:
        name, (tokens, size) = min(few.items(), key=lambda each: each[1][0] / each[1][1])
        logger.warning(
            "%s: %d of %d projections saw fewer tokens of its calibration set than they have inputs, such as %s, "
            "%d tokens for %d inputs: the ridge keeps the fit stable, but it may not hold for other texts; raise "
            "samples or max_tokens, to 2 tokens per input",
            *(expert, len(few), len(seen), name, tokens, size),
        )
