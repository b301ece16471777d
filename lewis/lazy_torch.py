"""Import torch at its first use: it takes a second to load, and a compiled merge does not need it.

A module that imports `torch` from here needs `from __future__ import annotations`: otherwise its annotations would use
torch, and so load it, at import.
"""

import importlib
from typing import TYPE_CHECKING, Any


class _Lazily:
    """A stand-in for a module, which is imported when one of its attributes is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch as torch
    from torch import nn as nn
else:
    torch, nn = _Lazily("torch"), _Lazily("torch.nn")
