"""A bucket that keeps its objects in memory and misbehaves on request, as `LEWIS_STORE=odd://bucket/prefix`."""

import random
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem


class OddBucket(AbstractFileSystem):
    """Objects are whole or absent, as in S3, and each call is atomic.

    Attributes:
        objects: path -> bytes.
        random: decides when a fault strikes.
        stale: how often a listing is an earlier one.
        partial: how often a listing lacks some names.
        twice: how often a call is made twice, as by a client that lost the first answer.
        lost: how often an upload loses its second half, and nobody says so.
    """

    protocol = "odd"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    modified_at: ClassVar[dict[str, float]] = {}
    lock = threading.RLock()
    random = random.Random(0)
    stale = partial = twice = lost = 0.0
    _earlier: ClassVar[dict[str, list[list[str]]]] = {}

    @classmethod
    def clear(cls, seed: int, **faults: float) -> None:
        """Empty it, and misbehave in this way from now on."""
        cls.objects, cls.modified_at, cls._earlier = {}, {}, {}
        cls.random = random.Random(seed)
        cls.behave(**faults)

    @classmethod
    def behave(cls, **faults: float) -> None:
        """Misbehave in this way from now on; without one, not at all."""
        for name in ("stale", "partial", "twice", "lost"):
            setattr(cls, name, faults.get(name, 0.0))

    def _strikes(self, fault: str) -> bool:
        return type(self).random.random() < getattr(type(self), fault)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The objects of a folder."""
        with self.lock:
            there = sorted(name for name in self.objects if name.rpartition("/")[0] == path)
            earlier = self._earlier.setdefault(path, [])
            earlier.append(there)
            if self._strikes("stale"):
                there = type(self).random.choice(earlier)
            if self._strikes("partial"):
                there = [name for name in there if type(self).random.random() < 0.5]
        if not there:
            raise FileNotFoundError(path)
        return [{"name": name, "size": 1, "type": "file"} for name in there] if detail else list(there)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Its size."""
        return {"name": path, "size": len(self.cat_file(path)), "type": "file"}

    def modified(self, path: str) -> datetime:
        """When it was written."""
        self.cat_file(path)
        return datetime.fromtimestamp(self.modified_at[path], UTC)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Its bytes."""
        with self.lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path][start:end]

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Download it."""
        Path(lpath).write_bytes(self.cat_file(rpath))

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        """Upload it."""
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write it; with the mode `create` only if it is not there."""
        for _ in range(2 if self._strikes("twice") else 1):
            with self.lock:
                if mode == "create" and path in self.objects:
                    raise FileExistsError(path)
                self.objects[path] = value[: len(value) // 2] if self._strikes("lost") else value
                self.modified_at[path] = time.time()

    def rm_file(self, path: str) -> None:
        """Remove it."""
        for _ in range(2 if self._strikes("twice") else 1):
            with self.lock:
                if path not in self.objects:
                    raise FileNotFoundError(path)
                del self.objects[path]


fsspec.register_implementation("odd", OddBucket, clobber=True)
