"""After how many documents the gate's verdict is certain, if scoring may end early, and how often it is wrong.

    python -m tests.benchmarks.looks [--runs N] [--documents N]

Champion and challenger differ on one document in ten, and on as many more as one of them gains. The margin is the
default. All verdicts are those of the real gate.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from lewis.evaluation.statistics import comparison, power
from lewis.recipe.schema import Gate
from tests.support.looks import drawn, judged
from tests.support.releases import KEY

BETS = 0.5 ** np.arange(1, 11)


def one(policy: str, stop: str, gain: float, documents: int, seed: int) -> tuple[bool, int]:
    """Whether a challenger passes, and after how many documents."""
    comparison.RESAMPLES = 50  # bootstraps decide nothing where answers are right or wrong
    answers = drawn(np.random.default_rng(seed), gain, documents)
    found, scored = judged(Gate(metric=KEY, policy=policy), stop, answers)
    return found.passed, scored


def ever_bound(gain: float, margin: float, documents: int, seed: int) -> bool:
    """Whether bounds that hold at all times (arXiv 2010.09686, bets of 1/2 to 1/1024) show within the documents that a
    challenger is not worse by the margin: the capital of a gambler who bets against it is once twentyfold.
    """
    answers = drawn(np.random.default_rng(seed), gain, documents)
    values = answers["merged"].astype(float) - answers["champion"] + margin
    return bool(np.exp(np.cumsum(np.log1p(BETS[:, None] * values), axis=1)).mean(axis=0).max() >= 20)


def main() -> None:
    """Print a line for each policy, key and true gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--documents", type=int, default=1000)
    options = parser.parse_args()
    margin = power.margin(power.spread([(1.0, options.documents)]))
    print(f"{options.documents} documents, margin {margin:.4f}, {options.runs} runs each")
    with ProcessPoolExecutor(2) as pool:
        for policy in ("not_worse", "better"):
            border = -margin if policy == "not_worse" else 0.0
            for gain in (0.2, 0.1, 0.05, 0.0, border, -0.1, -0.2):
                for stop in ("never", "known", "worse"):
                    task = partial(one, policy, stop, gain, options.documents)
                    found = list(pool.map(task, range(options.runs), chunksize=20))
                    passed, needed = zip(*found, strict=True)
                    half, most = np.quantile(needed, [0.5, 0.8])
                    print(
                        f"{policy:9} {stop:5} true gain {gain:+.3f}: passes {np.mean(passed):6.1%}, documents: "
                        f"mean {np.mean(needed):6.1f}, half {half:.0f}, 4 of 5 {most:.0f}",
                        flush=True,
                    )
        bounds = list(pool.map(partial(ever_bound, 0.0, margin, options.documents), range(options.runs), chunksize=20))
        print(f"not_worse, equal, by bounds that hold at all times: passes {np.mean(bounds):.1%}")


if __name__ == "__main__":
    main()
