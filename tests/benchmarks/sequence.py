"""How many documents it takes until a gain is known, by bounds that hold at all times (`statistics.sequential`).

    python -m tests.benchmarks.sequence [--runs N]

Two models differ on one document in ten, and on as many more as one of them gains. The margin is 0.05. A fixed number
of documents is what a single test needs to know it in four cases of five.
"""

import argparse
from statistics import NormalDist

import numpy as np

from lewis.evaluation.statistics import power
from lewis.evaluation.statistics.sequential import capital

MARGIN, LONGEST = 0.05, 20_000


def main() -> None:
    """Print a line for each true gain, then how often a bound is wrong at any time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    runs = parser.parse_args().runs
    needed = NormalDist().inv_cdf(1 - power.ERROR) + NormalDist().inv_cdf(power.POWER)
    for gain in (0.2, 0.1, 0.05, 0.0, -0.1, -0.15, -0.25):
        changed = power.CHANGED + abs(gain)
        chances = [(changed - gain) / 2, 1 - changed, (changed + gain) / 2]
        for known, bound in (("better", 0.0), ("not worse", -MARGIN), ("worse", -MARGIN)):
            sign = -1 if known == "worse" else 1
            if sign * (gain - bound) <= 0:
                continue
            found = []
            for seed in range(runs):
                drawn = np.random.default_rng(seed).choice([-1, 0, 1], LONGEST, p=chances)
                past = np.flatnonzero(capital(sign * drawn, sign * bound) >= 1 / power.ERROR)
                found.append(int(past[0]) + 1 if len(past) else LONGEST)
            fixed = changed * (needed / (gain - bound)) ** 2
            print(
                f"gain {gain:+.2f}, {known}: half of the runs know it after {np.median(found):.0f} documents, "
                f"four of five after {np.quantile(found, 0.8):.0f}; of a fixed number {fixed:.0f}"
            )
    chances = [power.CHANGED / 2, 1 - power.CHANGED, power.CHANGED / 2]
    drawn = (np.random.default_rng(seed).choice([-1, 0, 1], 2000, p=chances) for seed in range(4 * runs))
    wrong = sum(capital(each, 0.0).max() >= 1 / power.ERROR for each in drawn)
    print(f"equal models called better at any of 2000 documents: {wrong} of {4 * runs} runs")


if __name__ == "__main__":
    main()
