"""Many versions of one model in a row before the real gate: their answers are drawn, all else is as in a run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from lewis.evaluation.gate import Incumbent, Standing, judge
from lewis.evaluation.statistics.power import CHANGED
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Ends, Evaluated, Part, Samples, Score
from lewis.recipe.schema import Gate

KEY = "maths/acc,none"
ENDS = Ends({}, 0, 0, None)
FLIPS = (1 - (1 - 2 * CHANGED) ** 0.5) / 2  # of the answers of a version: then two versions differ on `CHANGED`
RIGHT = 0.6  # share of the documents that the versions' common model has right


@dataclass
class Releases:
    """What became of the versions.

    Attributes:
        promoted: which became the champion, by their place in the row.
        quality: the true gain of the champion over the first one, after each version.
        first: what the first champion scored on the documents.
        score: what the champion scored on them, after each version.
    """

    first: float = 0.0
    promoted: list[int] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)


def answers(rng: np.random.Generator, common: np.ndarray, gain: float) -> np.ndarray:
    """The answers of a version, right or wrong.

    Args:
        common: those of a model that all versions are like.
        gain: how much more of all documents it has right on average than a version of gain 0.
    """
    wrong, right = FLIPS + max(gain, 0) / (1 - RIGHT), FLIPS + max(-gain, 0) / RIGHT
    return np.where(rng.random(len(common)) < np.where(common, right, wrong), ~common, common)


def scored(label: str, values: np.ndarray) -> Scored:
    """A version with one task."""
    plain = tuple(map(float, values))
    samples = Samples("maths", "acc,none", (Part("maths", 1.0, "mean", tuple(map(str, range(len(plain)))), plain),))
    score = Score("maths", "acc,none", float(np.mean(values)), None, True, len(plain))
    return Scored.of(label, label, Evaluated([score], [samples], ENDS, {}))


def releases(
    gate: Gate, seed: int, documents: int, versions: int, gain: Callable[[int, float], float], fresh: bool = False
) -> Releases:
    """Let `versions` models come before a gate one after another, the first as the champion.

    Args:
        gain: the true gain of a version over the first champion, by its number and that of the champion.
        fresh: whether each has documents of its own, on which champion and mark are scored too; else all have the same.
    """
    rng, found = np.random.default_rng(seed), Releases()
    common = rng.random(documents) < RIGHT
    drawn = {0: scored("0", answers(rng, common, 0.0))}
    champion, mark, quality, judged, true_of_mark = 0, 0, 0.0, 0, 0.0
    found.first = drawn[0].scores[0].value
    for number in range(1, versions + 1):
        true = gain(number, quality)
        if fresh:
            common = rng.random(documents) < RIGHT
            drawn[champion] = scored(str(champion), answers(rng, common, quality))
            if mark != champion:
                drawn[mark] = scored(str(mark), answers(rng, common, true_of_mark))
        drawn[number] = scored(str(number), answers(rng, common, true))
        verdict = judge(
            gate,
            [replace(drawn[champion], label="champion"), drawn[number]],
            str(number),
            champion=Incumbent(str(champion), str(champion)),
            standing=Standing(Incumbent(str(mark), str(mark)), judged + 1),
            marked=drawn[mark],
        )
        judged += 1
        if verdict.passed:
            champion, quality = number, true
            found.promoted.append(number)
            if not verdict.mark:
                mark, judged, true_of_mark = number, 0, true
        found.quality.append(quality)
        found.score.append(drawn[champion].scores[0].value)
    return found
