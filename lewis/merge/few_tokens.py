"""Tells of calibration sets that are too small for what is fitted to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def tell_of_few_tokens(expert: str, seen: Mapping[str, tuple[int, int]]) -> None:
    """Warn if projections saw no token, or fewer than they have inputs; the fit is stable, but may not hold elsewhere.

    Args:
        expert: whose calibration set it is.
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
