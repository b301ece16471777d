"""Load the compiled loops in half the time: without what numba looks for and they do not need, and in one go."""

import gc
import importlib
import sys

_LOOPS = "lewis.merging.engine.kernels"
_UNUSED = ("scipy", "coverage")  # for linear algebra inside of loops, which ours do not have, and for their coverage


def load_loops() -> None:
    """Import the compiled loops of a merge. For the beginning of a program: another thread finds no scipy meanwhile."""
    if _LOOPS in sys.modules:
        return
    hidden = [name for name in _UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # so that importing it fails
    gc.disable()  # modules are no garbage: to look through them again and again is an eighth of the start of a merge
    try:
        importlib.import_module(_LOOPS)
    finally:
        gc.freeze()
        gc.enable()
        for name in hidden:
            del sys.modules[name]
