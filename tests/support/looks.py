"""An evaluation that ends early, before the real gate: two models' answers are drawn, all else is as in a run."""

from collections.abc import Mapping

import numpy as np

from lewis.evaluation.gate import Incumbent, Verdict, judge
from lewis.evaluation.statistics.looks import FIRST, Stop, look_at
from lewis.evaluation.statistics.scored import Scored
from lewis.recipe.schema import Gate
from tests.support.releases import scored

CHAMPION = Incumbent("models:/m/1", "a" * 64)


def drawn(rng: np.random.Generator, gain: float, documents: int, changed: float = 0.1) -> dict[str, np.ndarray]:
    """Answers of champion and challenger, which differ on `changed` of the documents and on as many as one gains."""
    changed += abs(gain)
    kinds = rng.choice(
        4, documents, p=[(changed + gain) / 2, (changed - gain) / 2, 0.5 * (1 - changed), 0.5 * (1 - changed)]
    )
    return {"champion": np.isin(kinds, (1, 2)), "merged": np.isin(kinds, (0, 2))}


def judged(gate: Gate, stop: Stop, answers: Mapping[str, np.ndarray]) -> tuple[Verdict, int]:
    """The verdict, and on how many documents it is: the gate looks as in a run."""
    pool = len(answers["merged"])
    documents: int | None = FIRST if stop != "never" else None
    while True:
        look = look_at(stop, documents, {"maths": pool})
        models: list[Scored] = [scored(name, values[:documents]) for name, values in answers.items()]
        found = judge(gate, models, "b" * 64, champion=CHAMPION, look=look)
        if found.certain:
            return found, documents or pool
        documents = look.after
