"""How lm-eval puts a score together: from one value per document, or from all documents together."""

from typing import Any

SUMMED = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
"""lm-eval's names of the aggregations of a value per document that are functions of two sums."""


def plain_value(value: Any) -> Any:
    """lm-eval's value of a document as a float or a pair [log-likelihood, weight]; None for anything else."""
    if isinstance(value, list | tuple) and len(value) == 2:
        pair = [plain_value(each) for each in value]
        return pair if all(isinstance(each, float) for each in pair) else None
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) else None


def aggregation_of(task: Any, metric: str) -> str | None:
    """lm-eval's name of the aggregation over documents; None if it is not a function of two sums."""
    from lm_eval.api import metrics

    known = {getattr(metrics, name): name for name in SUMMED}
    return known.get(task.aggregation().get(metric, metrics.mean))
