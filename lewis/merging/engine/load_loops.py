"""Load the compiled loops in half the time, by a numba that finds neither scipy nor coverage."""

import importlib
import sys

from lewis.quick_imports import quick_imports

_LOOPS = "lewis.merging.engine.kernels"
_UNUSED = ("scipy", "coverage")  # numba needs them for linear algebra in loops, which these lack, and for coverage


def load_loops() -> None:
    """Import the compiled loops of a merge. Call it before other threads start: scipy cannot be imported meanwhile."""
    if _LOOPS in sys.modules:
        return
    hidden = [name for name in _UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # so that importing it fails
    try:
        with quick_imports():
            importlib.import_module(_LOOPS)
    finally:
        for name in hidden:
            del sys.modules[name]
