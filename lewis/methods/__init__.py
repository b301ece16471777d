"""Merge methods: one annotated function each. Its signature is the schema of its YAML parameters.

Importing this package registers the methods; `METHODS` maps their names to them. A function takes fp32 tensors of shape
(experts, *tensor.shape): task vectors (expert minus base) to return a delta for the base, or, with `on="weights"`, the
models' own weights to return the merged ones. The functions may also be called directly, with one number for all
experts. Methods of other packages are found by their entry points (`lewis.plugins`).
"""

from lewis.methods.registry import METHODS, Method, Parameter, PerExpert, Range, merge_method, per_expert

from lewis.methods import linear, task_arithmetic, ties, dare, breadcrumbs, della, sce, pcb, consensus  # isort: skip # noqa: F401
from lewis.methods import model_stock, ram, nearswap, arcee_fusion, passthrough  # isort: skip # noqa: F401
from lewis.methods import slerp, nuslerp, multislerp, karcher, regmean  # isort: skip # noqa: F401

find = METHODS.find

__all__ = ["METHODS", "Method", "Parameter", "PerExpert", "Range", "find", "merge_method", "per_expert"]
