"""Merge methods: one annotated function each. Its signature is the schema of its YAML parameters.

Importing this package registers the methods; `METHODS` maps their names to them. A function takes fp32 tensors of shape
(experts, *tensor.shape): task vectors (expert minus base) to return a delta for the base, or, with `on="weights"`, the
models' own weights to return the merged ones. It may be called by itself, with one number for all experts.
"""

from lewis.methods.registry import METHODS, Method, Parameter, PerExpert, merge_method, per_expert

from lewis.methods import dare, linear, task_arithmetic, ties  # isort: skip  # each registers its methods

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "PerExpert",
    "dare",
    "linear",
    "merge_method",
    "per_expert",
    "task_arithmetic",
    "ties",
]
