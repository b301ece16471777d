"""Reference answers as an lm-eval score: how well a model predicts them, a signal that small models give too."""

import math
import re
from typing import Any

from datasets import Dataset


def gsm8k(rows: Dataset) -> Dataset:
    """Questions, and worked answers without the calculator's <<...>> notes."""
    return rows.map(
        lambda row: {
            "prompt": f"Question: {row['question']}\nAnswer:",
            "target": " " + re.sub(r"<<.*?>>", "", row["answer"]),
        }
    )


def mbpp(rows: Dataset) -> Dataset:
    """Descriptions with the first test, and code. The line break is scored with the code, as lm-eval does it."""
    return rows.map(
        lambda row: {
            "prompt": f"{row['text']}\n{row['test_list'][0]}",
            "target": "\n" + row["code"].replace("\r", ""),
        }
    )


def bits_per_byte(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Negative log-likelihood of the target, in bits per byte of UTF-8: comparable between tokenizers."""
    loglikelihood, _ = results[0]
    return {"bits_per_byte": -loglikelihood / math.log(2) / len(row["target"].encode())}
