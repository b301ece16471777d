"""What an expert is probably good at, and which public rows and task of lm-eval tell how much of that a merge keeps."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A field that experts are trained in.

    Attributes:
        name: of the calibration set.
        words: regular expression of what names such an expert, its datasets or its tags.
        dataset, config: of the Hub, with a split `train`; None: its only configuration.
        text: template that turns a row into text, without the end token.
        task: of lm-eval; empty if it has none that runs without a permission.
        score: of the task, `metric,filter`.
        note: what to know about it; empty if there is nothing.
    """

    name: str
    words: str
    dataset: str
    config: str | None
    text: str
    task: str = ""
    score: str = ""
    note: str = ""


GENERAL = Topic(
    "general",
    r"$.",
    "EleutherAI/wikitext_document_level",
    "wikitext-2-raw-v1",
    "{page}",
    "sciq",
    "acc,none",
    "nothing tells what this expert is good at: put in rows of its training data",
)
"""For an expert of which nothing is known."""

TOPICS = (
    Topic(
        "gsm8k",
        r"math|gsm|arithmetic|algebra|numina|orca.?math",
        "openai/gsm8k",
        "main",
        "Question: {question}\nAnswer: {answer}",
        "gsm8k",
        "exact_match,flexible-extract",
    ),
    Topic(
        "mbpp",
        r"code|coder|python|mbpp|humaneval|program",
        "google-research-datasets/mbpp",
        "full",
        "{text}\n{test_list[0]}\n{code}",
        note="lm-eval would run programs on the bare machine: score by deployments/recipes/tasks/mbpp_generate.yaml",
    ),
    Topic(
        "sciq",
        r"scien|sciq|physic|chemi|biolog|medic|medqa|knowledge",
        "allenai/sciq",
        None,
        "{support}\nQuestion: {question}\nAnswer: {correct_answer}",
        "sciq",
        "acc,none",
    ),
)


def topic_of(*told: str) -> Topic:
    """The topic of a model, by the first of some texts that names one; `GENERAL` if none does.

    Args:
        told: the surest first, such as the model's name, then its datasets and tags.
    """
    for text in told:
        found = [topic for topic in TOPICS if re.search(topic.words, text.lower())]
        if found:
            return found[0]
    return GENERAL
