"""Second-order statistics on disk: a folder with two safetensors files for each block.

For each input of a block, `BLOCK.safetensors` holds `gram` or `rows`, as `Collected.result` describes them; its
metadata holds the number of tokens of each input, and the input of each projection. `BLOCK.squares.safetensors` holds
`squares`, which are a thousandth as large, and all that norms need. The manifest of the folder has the checksum of each
file, which is compared before anything is read from the file.

Of the symmetric sums of x^T x only one half is computed and kept: the rows of the matrix are cut into parts, and each
part has a slab, its rows from the columns of the diagonal block on. One flat tensor holds all slabs, one after another.
The cuts depend on the size only, and each slab is computed by itself: so the sums have the same bits for any number of
threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from lewis import store
from lewis.errors import LewisError
from lewis.lazy_torch import torch
from lewis.methods.arithmetic import regression
from lewis.methods.arithmetic.regression import COLUMNS, keeps_rows
from lewis.methods.arithmetic.sums import slices
from lewis.methods.arithmetic.tokens import Gram, Rows
from lewis.models.files.safetensors_file import TensorFile, write_file

SEMANTICS = "4"  # bump when the same inputs would give other statistics
_ENDING, _SQUARES, _HEADER = ".safetensors", ".squares.safetensors", "statistics"


class Collected:
    """The inputs of one layer, collected as rows or as sums of products: `regression.keeps_rows` decides which.

    Attributes:
        tokens: number of rows that were added.
        size: number of inputs.
    """

    def __init__(self, size: int, expected: int) -> None:
        """
        Args:
            size: number of inputs.
            expected: tokens that will be added at most. Of a very wide layer only some are kept, evenly spaced.
        """
        self.tokens, self.size, self._expected = 0, size, expected
        self._rows: list[torch.Tensor] = []
        self._packed: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def add(self, parts: Sequence[torch.Tensor]) -> list[Callable[[], None]]:
        """Add rows, fp32 (tokens, in) in parts; the caller must not use them again.

        Returns:
            Jobs that add the rows to the products; all must have been run before the next `add`.
        """
        for part in parts:
            self._take(part)
        if keeps_rows(self.size, self.tokens):
            return []
        if self._packed is None:
            self._packed = torch.zeros(packed_length(self.size), device=self._rows[0].device)
        taken, self._rows = self._rows, []
        return [partial(_multiply, taken, cut, slab) for cut, slab in slabs(self._packed, self.size)]

    def _take(self, rows: torch.Tensor) -> None:
        if self.size > regression.DUAL_ABOVE and self._expected > regression.DUAL_TOKENS:
            squares = rows.square().sum(dim=0, dtype=torch.float64)
            self._squares = squares if self._squares is None else self._squares + squares
            self._rows.append(rows[self._of_even_share(len(rows))])
        else:
            self._rows.append(rows)
        self.tokens += len(rows)

    def _of_even_share(self, count: int) -> torch.Tensor:
        """Indices of those of the next `count` rows that are kept: `DUAL_TOKENS`, spread evenly over all expected."""
        taken = torch.arange(regression.DUAL_TOKENS) * self._expected // regression.DUAL_TOKENS - self.tokens
        return taken[(taken >= 0) & (taken < count)]

    def result(self) -> dict[str, list[torch.Tensor]]:
        """The kept inputs or products, on the CPU, fp32. Call it once, after the last `add`.

        Returns:
            Name -> parts, one below the other: `squares`, the mean of x_j^2, (in,); and either `gram`, the mean of
            x^T x, packed in slabs, or `rows`, (tokens, in).
        """
        if self._packed is not None:
            self._packed /= self.tokens
            packed = self._packed.cpu()
            of_slabs = [slab.diagonal() for _, slab in slabs(packed, self.size)]
            return {"squares": [torch.cat(of_slabs)], "gram": [packed]}
        squares = self._squares
        if squares is None:
            squares = sum((rows.square().sum(dim=0, dtype=torch.float64) for rows in self._rows), torch.zeros(()))
        return {"squares": [(squares / max(self.tokens, 1)).float().cpu()], "rows": [rows.cpu() for rows in self._rows]}


def _multiply(parts: list[torch.Tensor], cut: slice, slab: torch.Tensor) -> None:
    for part in parts:
        slab.addmm_(part[:, cut].T, part[:, cut.start :])


def packed_length(size: int) -> int:
    """Elements of the flat tensor for a matrix of this many rows and columns."""
    return sum((cut.stop - cut.start) * (size - cut.start) for cut in slices(size, COLUMNS))


def slabs(packed: torch.Tensor, size: int) -> list[tuple[slice, torch.Tensor]]:
    """Return for each slab of a flat tensor the slice of its rows, and a view (rows, columns from the slice on)."""
    found, start = [], 0
    for cut in slices(size, COLUMNS):
        rows, columns = cut.stop - cut.start, size - cut.start
        found.append((cut, packed[start : start + rows * columns].view(rows, columns)))
        start += rows * columns
    return found


def unpacked(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Expand a flat tensor of slabs to the whole symmetric matrix, (size, size)."""
    matrix = torch.empty(size, size, dtype=packed.dtype)
    for cut, slab in slabs(packed, size):
        matrix[cut, cut.start :] = slab
        matrix[cut.start :, cut] = slab.T
    return matrix


class _Place(NamedTuple):
    file: str
    key: str
    tokens: int
    size: int


def write(folder: Path, block: str, inputs: Mapping[str, Collected], sources: Mapping[str, str]) -> dict[str, str]:
    """Write the statistics of one block into its two files.

    Args:
        folder: where the files go.
        block: its path in the network.
        inputs: name of an input -> its collected rows or products.
        sources: name of a projection -> the name of its input.

    Returns:
        Name of each of the two files -> its SHA-256.

    Raises:
        ValueError: naming an input that is not finite.
    """
    tensors, squares = dict[str, list[torch.Tensor]](), dict[str, list[torch.Tensor]]()
    for key, each in inputs.items():
        result = each.result()
        squares[f"{key}|squares"] = result.pop("squares")
        if not bool(squares[f"{key}|squares"][0].isfinite().all()):
            raise ValueError(key)
        tensors |= {f"{key}|{kind}": parts for kind, parts in result.items()}
    header = {"inputs": {key: [each.tokens, each.size] for key, each in inputs.items()}, "sources": dict(sources)}
    contents = {f"{block}{_SQUARES}": (squares, {}), f"{block}{_ENDING}": (tensors, {_HEADER: json.dumps(header)})}
    return {name: write_file(folder / name, *content) for name, content in contents.items()}


class FinishedFiles:
    """The files that a pass or a fit has finished so far. Until all are, a list of their checksums is next to them.

    By that list, the next process finds the files that a killed one had finished, except those damaged since.

    Attributes:
        checksums: file name -> SHA-256.
    """

    def __init__(self, folder: Path) -> None:
        self._index = folder / "blocks.json"
        known = store.read_entry(self._index) or {}
        whole = (path for name in known if (path := folder / name).is_file())
        self.checksums = {
            path.name: sha256 for path in whole if (sha256 := store.file_sha256(path)) == known[path.name]
        }

    def __contains__(self, block: str) -> bool:
        return f"{block}{_ENDING}" in self.checksums and f"{block}{_SQUARES}" in self.checksums

    def add(self, checksums: Mapping[str, str]) -> None:
        """Add the files of a block to the list, with the checksums that `write` returned."""
        self.checksums |= checksums
        store.write_entry(self._index, self.checksums)

    def remove_list(self) -> None:
        """Remove the list once all files are written: it is no part of the statistics."""
        self._index.unlink(missing_ok=True)


class Grams:
    """The second-order statistics of one model on one calibration set."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: with the files, and their checksums in its manifest.

        Raises:
            LewisError: if the folder is gone, or a file is missing or has another size.
        """
        self.folder, self._checked, self._checking = folder, set[str](), Lock()
        manifest = store.read_manifest(folder, content=False)
        if manifest is None:
            raise LewisError(f"{folder}: the statistics of a model's inputs are gone or cut short; run again")
        self._checksums = {name: each["sha256"] for name, each in manifest["files"].items()}
        self._places = dict[str, list[_Place]]()  # several if blocks share the weight
        for name in sorted(name for name in self._checksums if not name.endswith(_SQUARES)):
            header = self._header(name)
            for projection, key in header["sources"].items():
                if key and header["inputs"][key][0]:
                    self._places.setdefault(projection, []).append(_Place(name, key, *header["inputs"][key]))

    def __contains__(self, projection: str) -> bool:
        return projection in self._places

    def source(self, projection: str) -> str | None:
        """Name of a projection's input, the same for all that share it; None if no token was seen to reach it."""
        places = self._places.get(projection)
        return None if places is None else " ".join(f"{place.file}|{place.key}" for place in places)

    def tokens(self, projection: str) -> int:
        """How many tokens reached a projection."""
        return sum(place.tokens for place in self._places.get(projection, ()))

    def size(self, projection: str) -> int:
        """Number of inputs of a projection that tokens reached."""
        return self._places[projection][0].size

    def squares(self, projection: str) -> torch.Tensor:
        """The mean of x_j^2 over the tokens that reached a projection, fp32 (in,)."""
        places = self._places[projection]
        sums = [self._read(place, "squares").double() * place.tokens for place in places]
        return (torch.stack(sums).sum(dim=0) / self.tokens(projection)).float()

    def inputs(self, projection: str, weight: float = 1.0) -> Gram | Rows:
        """Return a projection's inputs for a static fit: mean products, or rows. No other block may share its weight.

        Args:
            projection: name of the network's parameter, as `passes.of_expert` gives it for one of stacked experts.
            weight: how much all its tokens together count.

        Raises:
            LewisError: if the file is damaged.
        """
        [place] = self._places[projection]
        try:
            packed = self._read(place, "gram")
        except KeyError:
            rows = [self._read(place, "rows")]
            return Rows(rows, rows, weight)
        return Gram(unpacked(packed, place.size), place.tokens, weight)

    def _header(self, name: str) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / name, framework="pt") as file:
                found: dict[str, Any] = json.loads(file.metadata()[_HEADER])
                return found
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(name) from error

    def _read(self, place: _Place, kind: str) -> torch.Tensor:
        """Map one tensor of a file, whose checksum is compared first; KeyError if the file does not have it."""
        name = place.file.removesuffix(_ENDING) + (_SQUARES if kind == "squares" else _ENDING)
        path = self.folder / name
        with self._checking:
            if name not in self._checked:
                if not path.is_file() or store.file_sha256(path) != self._checksums.get(name):
                    raise self._damaged(name)
                self._checked.add(name)
        where = TensorFile(path).places[f"{place.key}|{kind}"]
        return torch.from_numpy(np.memmap(path, np.float32, "c", where.start, where.shape))

    def _damaged(self, name: str) -> LewisError:
        """The error for a damaged file; the entry is set aside, so that another run measures it again."""
        store.set_aside([self.folder], f"{name} is not as it was written")
        return LewisError(f"{self.folder / name} is damaged: it is not as it was written; run again to measure it")
