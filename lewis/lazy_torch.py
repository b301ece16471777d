"""torch, imported when it is first used: it takes a second to load, and a compiled merge does without.

A module that takes `torch` from here has `from __future__ import annotations`, so that its signatures do not use it.
"""

import importlib
from typing import TYPE_CHECKING, Any


class _Lazily:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch as torch
    from torch import nn as nn
else:
    torch, nn = _Lazily("torch"), _Lazily("torch.nn")
