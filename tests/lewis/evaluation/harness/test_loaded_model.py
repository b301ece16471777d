"""What the gate's guards measure on a model, with a model that is a fake."""

from types import SimpleNamespace
from typing import Any

from lewis.evaluation.harness.loaded_model import measure_ends


class Thinking:
    """lm-eval's model with `enable_thinking`: it generates, and refuses likelihoods."""

    enable_thinking = True
    tokenizer = SimpleNamespace()
    max_length = 64

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return [1] * len(text.split())

    def generate_until(self, asked: list[Any], **_: Any) -> list[str]:
        return ["a short answer" for _ in asked]

    def loglikelihood(self, *_: Any, **__: Any) -> None:
        raise ValueError("enable_thinking=True is not compatible with loglikelihood tasks")


def test_a_model_that_thinks_is_measured_without_the_perplexity_of_the_answers() -> None:
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(target_delimiter=" "))
    row = {"arguments": [("2 + 2 =", {})], "target": "4", "resps": [["4"]], "filter": "none"}
    found = measure_ends(Thinking(), {"maths": [row]}, {"maths": task})
    assert found == {"empty": {"maths": 0.0}, "tried": 1, "ended": 1, "perplexity": None}
