"""A bucket that keeps its objects in memory and misbehaves on request, as `LEWIS_STORE=odd://bucket/prefix`."""

import random
import threading
import time
from collections import Counter
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
        struck: fault -> how often it has changed what a caller got or what is there; a test may empty it.
        lists: how often it was asked for a list.
    """

    protocol = "odd"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    modified_at: ClassVar[dict[str, float]] = {}
    lock = threading.RLock()
    random = random.Random(0)
    stale = partial = twice = lost = 0.0
    struck: ClassVar[Counter[str]] = Counter()
    lists = 0
    _earlier: ClassVar[dict[str, list[dict[str, dict[str, Any]]]]] = {}

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

    def _times(self) -> int:
        """How often a call is made."""
        twice = self._strikes("twice")
        type(self).struck["twice"] += twice
        return 1 + twice

    def _list(self, place: str, there: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What it says of `there`, name -> facts, with its faults; each list of `place` is remembered."""
        own = type(self)
        own.lists += 1
        earlier = self._earlier.setdefault(place, [])
        earlier.append(there)
        for fault in ("stale", "partial"):
            if self._strikes(fault):
                kept = {name: facts for name, facts in there.items() if own.random.random() < 0.5}
                said = own.random.choice(earlier) if fault == "stale" else kept
                own.struck[fault] += said != there
                there = said
        return there

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The objects of a folder."""
        with self.lock:
            names = sorted(name for name in self.objects if name.rpartition("/")[0] == path)
            there = self._list(path, {name: {"name": name, "size": 1, "type": "file"} for name in names})
        if not there:
            raise FileNotFoundError(path)
        return list(there.values()) if detail else list(there)

    def find(self, path: str, *_: Any, detail: bool = False, **__: Any) -> Any:
        """The objects whose names begin so, in one list as S3's; there may be none."""
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(f"{path}/"))
            there = self._list(f"{path}/**", {name: self.info(name) for name in names})
        return there if detail else list(there)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Its size, and when it was written."""
        with self.lock:
            return {"name": path, "size": len(self.cat_file(path)), "type": "file", "mtime": self.modified_at[path]}

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
        for _ in range(self._times()):
            with self.lock:
                if mode == "create" and path in self.objects:
                    raise FileExistsError(path)
                half = self._strikes("lost")
                type(self).struck["lost"] += half
                self.objects[path] = value[: len(value) // 2] if half else value
                self.modified_at[path] = time.time()

    def rm_file(self, path: str) -> None:
        """Remove it."""
        for _ in range(self._times()):
            with self.lock:
                if path not in self.objects:
                    raise FileNotFoundError(path)
                del self.objects[path]


fsspec.register_implementation("odd", OddBucket, clobber=True)
