"""Two hundred versions of one model before the gate, many times over: what chance, a true gain and small losses do.

    python -m tests.benchmarks.releases [--rows N] [--versions N] [--documents N]

Every row of versions begins with a champion. All have the same documents; each version's answers are drawn, so that
two versions of one quality differ on one document in ten. All verdicts are those of the real gate
(`tests.support.releases`).
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from lewis.evaluation.statistics import comparison, power
from lewis.recipe.schema import Gate
from tests.support.releases import KEY, Releases, releases

KINDS = ("equal", "a quarter of a margin less each time", "a margin less each time", "one gain, the last")


def one(policy: str, kind: str, documents: int, versions: int, gained: float, fresh: bool, seed: int) -> Releases:
    """One row of versions."""
    comparison.RESAMPLES = 50  # bootstraps decide nothing where answers are right or wrong
    margin = power.margin(power.spread([(1.0, documents)]))

    def gain(number: int, champion: float) -> float:
        if kind == "equal":
            return 0.0
        if kind == "one gain, the last":
            return gained if number == versions else 0.0
        return champion - margin / (4 if "quarter" in kind else 1)

    return releases(Gate(metric=KEY, policy=policy), seed, documents, versions, gain, fresh)


def enough(gain: float, number: int) -> int:
    """The number of documents with which a plan promises that a gain is seen."""
    return next(n for n in range(10, 10**6, 10) if power.gain_seen(power.spread([(1.0, n)]), number) <= gain)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 100), ("versions", 200), ("documents", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    spread = power.spread([(1.0, options.documents)])
    margin = power.margin(spread)
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{options.rows} rows of {options.versions} versions, {options.documents} documents, margin {margin:.4f}\n")
    with ProcessPoolExecutor(2) as pool:

        def run(
            policy: str,
            kind: str,
            versions: int = options.versions,
            gained: float = 0.0,
            documents: int = options.documents,
            fresh: bool = False,
        ) -> list[Releases]:
            task = partial(one, policy, kind, documents, versions, gained, fresh)
            return list(pool.map(task, range(options.rows), chunksize=5))

        found = run("better", "equal")
        print(f"better, equal versions: {np.mean([bool(row.promoted) for row in found]):.1%} of rows promote one ever")
        for fresh, kind in ((fresh, each) for fresh in (False, True) for each in KINDS[:3]):
            policy = "not_worse"
            found = run(policy, kind, fresh=fresh)
            share = [len(row.promoted) / options.versions for row in found]
            ends = [row.quality[-1] / margin for row in found]
            kind += ", fresh documents for each" if fresh else ""
            print(
                f"{policy}, {kind}: {np.mean(share):.0%} of versions promoted "
                f"({np.quantile(share, 0.1):.0%} in the worst tenth of rows); the champion's true loss at the end in "
                f"margins: mean {-np.mean(ends) + 0:.2f}, worst {-np.min(ends) + 0:.2f}"
            )
            if kind == "equal" and not fresh:
                for after in (1, 10, 50, options.versions):
                    drift = np.mean([row.score[after - 1] - row.first for row in found])
                    print(
                        f"    the champion scores {drift:+.4f} more than the first one after {after} versions, by luck"
                    )
        interval = 1.96 * spread
        for versions in (1, 10, 50):
            needed = enough(interval, versions)
            found = run("better", KINDS[3], versions, interval, needed)
            seen = np.mean([versions in row.promoted for row in found])
            print(
                f"better, a true gain of {interval:.4f}, one interval on {options.documents} documents, "
                f"in version {versions}: found in {seen:.0%} of rows with {needed} documents"
            )


if __name__ == "__main__":
    main()
