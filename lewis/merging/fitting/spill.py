"""Where a fit keeps the tensors of paused passes: in memory or, if they are large, in files mapped into memory.

The rule: if the passes need more than `IN_MEMORY` bytes, by the estimate of `fit.paused_bytes`, then every tensor of
at least `LARGE` bytes that a pass holds while it waits, and every weight of that size, is in a file of its own. The
operating system writes such files out and reads them back as it needs memory. Their names are deleted as soon as they
are mapped, so that they are gone with the process, however it ends. Results do not depend on where tensors are kept.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

IN_MEMORY = 2 << 30  # bytes that may stay in memory; `lewis/methods/README.md` names both numbers
LARGE = 1 << 20  # bytes of a tensor that is kept in a file


class Spill:
    """Keeps tensors in memory or, if a folder is given, large ones in files.

    Attributes:
        folder: folder of the files; None: everything stays in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Make an uninitialised tensor, in a file if it is large and files are used.

        Raises:
            OSError: if the disk is full.
        """
        size = torch.Size(shape).numel()
        bytes_needed = size * dtype.itemsize
        if self.folder is None or bytes_needed < LARGE:
            return torch.empty(shape, dtype=dtype)
        path = self.folder / f"{uuid.uuid4().hex}.rest"
        try:
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, bytes_needed)  # a full disk would end the process at a write
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)
        finally:
            path.unlink(missing_ok=True)

    def keep(self, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor with these values, in a file if it is large and files are used.

        Args:
            value: the values; the same tensor is returned if it may stay where it is and has the dtype.
            dtype: dtype of the result; None: that of `value`.
        """
        dtype = dtype or value.dtype
        in_place = self.folder is None or value.numel() * dtype.itemsize < LARGE or _in_file(value.untyped_storage())
        if in_place or value.device.type != "cpu":
            return value.to(dtype)
        return self.empty(value.shape, dtype).copy_(value)

    def watch(self, made: Made) -> AbstractContextManager[Any]:
        """Return a context in which `made` notes the large tensors that are made; without files it notes none."""
        return nullcontext() if self.folder is None else made

    def move_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move tensors into files; those that share storage go into one file. The tensor objects stay the same."""
        moved: dict[int, torch.Tensor] = {}
        for each in tensors:
            storage = each.untyped_storage()
            if storage.nbytes() < LARGE or _in_file(storage):
                continue
            place = storage.data_ptr()
            if place not in moved:
                flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                moved[place] = self.empty(flat.shape, torch.uint8).copy_(flat)
            offset, stride = each.storage_offset(), each.stride()
            each.set_(moved[place].untyped_storage(), offset, each.shape, stride)


class Made(TorchFunctionMode):
    """A context that notes the large tensors which functions of torch return in it, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def alive(self) -> list[torch.Tensor]:
        """The noted tensors that something still refers to."""
        found = [each for each in (reference() for reference in self._made) if each is not None]
        self._made = [weakref.ref(each) for each in found]
        return found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(each) for each in (*args, *(kwargs or {}).values())}  # may be shared with other passes
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor) and id(each) not in given and each.untyped_storage().nbytes() >= LARGE:
                self._made.append(weakref.ref(each))
        return result


def _in_file(storage: torch.UntypedStorage) -> bool:
    return storage.filename is not None
