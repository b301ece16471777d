"""Made-up distances of a fit from its experts, for tests of what is concluded from them."""

from lewis.merging.fitting.held_back import Distance


def distance(mean: float, worst: float, divergence: float = 0.0) -> Distance:
    """A distance whose worst row has one token."""
    return Distance(mean, worst, margin=0.0, strain=worst, divergence=divergence)
