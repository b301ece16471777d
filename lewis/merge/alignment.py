"""Models whose embeddings are brought to one vocabulary, row by row, as they are read.

Where rows move, the tensor is written by runs of rows to a file without a name in the store, which is mapped as the
model's own files are: so it is never whole in memory, and gone when it has been merged, or the process has died.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.lazy_torch import torch
from lewis.merge.vocabulary import Target, plain_entry, union
from lewis.models.dtypes import as_tensor, bits_dtype, bytes_of, torch_dtype
from lewis.models.model import Model
from lewis.models.names import PER_TOKEN
from lewis.models.tokenizer import read_vocabulary, same, tokenizer_folder, vocabulary_of
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import TokenRow

_RUN = 1 << 20  # elements that are written at a time

Origin = tuple[tuple[int, int], ...]
"""(model, row) of each row that one row is the mean of; none: it is 0."""


@dataclass(frozen=True)
class Alignment:
    """The vocabulary of a merge.

    Attributes:
        donor: folder of the tokenizer and the generation config.
        source: the model whose tokenizer it is.
        target: None where the models agree, and nothing is to be done.
        views: id of a model -> the model as it is to be read.
        digest: identity of what is done; None for nothing.
    """

    donor: Path
    source: Model
    target: Target | None = None
    views: Mapping[int, Model] = field(default_factory=dict)
    digest: str | None = None

    def of(self, model: Model) -> Model:
        """A model as it is to be read."""
        return self.views.get(id(model), model)

    def finish(self, folder: Path) -> None:
        """Bring config and tokenizer, copied to `folder` from base and donor, to the vocabulary."""
        generation = self.source.home / "generation_config.json"  # an adapter has none
        if self.donor != self.source.home and generation.is_file() and not (folder / generation.name).exists():
            shutil.copyfile(generation, folder / generation.name)
        if self.target is not None:
            self.target.finish(folder, self.source.config)


def align(recipe: Recipe, base: Model, experts: Sequence[tuple[str, Model]], *, has_base: bool) -> Alignment:
    """Match the rows of embeddings and heads by token, as the recipe's tokenizer asks for.

    Args:
        base: the base; the first model, if there is none.
        experts: reference and model, in the order of their keys.
        has_base: whether there is a base.

    Raises:
        InputError: if a tokenizer that is needed cannot be read.
    """
    policy, source = recipe.vocabulary, base
    if policy is None:
        return Alignment(tokenizer_folder(base), base)
    by_name = {str(recipe.base_model): base, **dict(experts)}
    if policy.source not in ("base", "union"):
        source = _find(policy.source, by_name, "tokenizer.source")
    plain = Alignment(tokenizer_folder(source), source)
    models = list({id(model): model for model in (base, *(model for _, model in experts))}.values())
    names = [name for name in base.tensors if name.endswith(PER_TOKEN)]
    sizes = [_rows_of(model, names) for model in models]
    plainly = len(set(sizes)) == 1 and not policy.tokens and policy.pad_to_multiple_of is None
    if plainly and all(same(plain.donor, tokenizer_folder(model)) for model in models):
        return plain
    known = read_vocabulary(tokenizer_folder(base))
    if min(sizes) == 0 or (known is None and len(set(sizes)) == 1):
        return plain  # what is missing in a model is told with all else that does not fit
    if known is None:
        raise InputError(f"{tokenizer_folder(base)}: no tokenizer.json; the models' embeddings cannot be matched")
    ids = [vocabulary_of(model, known, rows) for model, rows in zip(models, sizes, strict=True)]
    chosen, added = models.index(source), []
    there = read_vocabulary(plain.donor) or known
    if policy.source == "union":
        added = union(base, models[1:], ids[1:])
        there = there | {entry["content"]: entry["id"] for entry in added}
    after = 1 + max(there.values(), default=-1)
    added += [plain_entry(token, after + i) for i, token in enumerate(sorted(policy.tokens.keys() - there.keys()))]
    there = there | {entry["content"]: entry["id"] for entry in added}
    has_row = set[str]().union(policy.tokens, *(ids if policy.source == "union" else [ids[chosen]]))
    wanted = {token: row for token, row in there.items() if token in has_row}
    count = 1 + max(wanted.values(), default=-1)
    pad = policy.pad_to_multiple_of
    rows = -(-count // pad) * pad if pad else max(count, sizes[chosen])
    target = Target(wanted, rows, count if pad else rows, added)
    maps, lent = _match(target, ids, sizes, chosen, has_base)
    for token, embedding in policy.tokens.items():
        row = wanted[token]
        if embedding.source is not None:
            lent[row] = _origin(token, embedding.source, by_name, models, ids, sizes)
        for own in maps if embedding.force and embedding.source is not None else ():
            own[row] = -1
    kept = [size == rows and np.array_equal(own, np.arange(rows)) for size, own in zip(sizes, maps, strict=True)]
    if all(kept) and not added and target.padded_from == rows:
        return plain
    shared = _Lent(models, lent)
    views = {id(m): Aligned(m, names, own, shared, target) for m, own in zip(models, maps, strict=True)}
    digest = store.digest([[own.tolist() for own in maps], sorted(lent.items()), target.padded_from, added])
    return replace(plain, target=target, views=views, digest=digest)


class Aligned:
    """A model with the rows of its embeddings in the order of another vocabulary; reads like a `Checkpoint`.

    Attributes:
        folder, key, config, tied: as of the model.
        tensors: with their new shapes.
    """

    def __init__(self, model: Model, names: Collection[str], rows: np.ndarray, lent: _Lent, target: Target) -> None:
        """Wrap a model.

        Args:
            names: of the tensors that have a row per token.
            rows: int64, shape (target.rows,): the model's own row for each; -1 where it has none.
            lent: the rows that it has not.
        """
        self.model, self.folder, self.key = model, model.folder, model.key
        self.config, self.tied = model.config, model.tied
        self._names, self._rows, self._lent = frozenset(names), rows, lent
        self._own_rows, self._copies = _rows_of(model, names), dict[str, tuple[str, np.ndarray]]()
        self._mean_from = target.padded_from if target.padded_from < target.rows else None
        in_order = self._mean_from is None and rows[0] >= 0 and np.array_equal(rows, np.arange(len(rows)) + rows[0])
        self._first = int(rows[0]) if in_order else None
        self.tensors = {
            name: replace(info, shape=(target.rows, *info.shape[1:])) if name in self._names else info
            for name, info in model.tensors.items()
        }

    @property
    def home(self) -> Path:
        """Where its config.json is."""
        return self.model.home

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype of `raw`."""
        if not self._touches(name):
            return self.model.read(name)
        dtype, bits = self.raw(name)
        shape = self.tensors[self.tied.get(name, name)].shape
        return as_tensor(dtype, bits.copy()).reshape(shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype and bits, as `Checkpoint.raw`; fp32 where rows are means, or come from other dtypes."""
        if not self._touches(name):
            return self.model.raw(name)
        if self._first is not None:
            dtype, bits = self.model.raw(name)
            width = bits.size // self._own_rows
            return dtype, bits[self._first * width : (self._first + len(self._rows)) * width]
        if name not in self._copies:
            self._copies[name] = self._copy(name)
        return self._copies[name]

    def _copy(self, name: str) -> tuple[str, np.ndarray]:
        lent, (dtype, bits) = self._lent.of(name, np.flatnonzero(self._rows < 0)), self.model.raw(name)
        out = dtype if lent.dtypes <= {dtype} and self._mean_from is None else "F32"
        try:
            store.home().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=store.home()) as file:
                for part in self._parts(dtype, bits.reshape(self._own_rows, -1), lent, out):
                    file.write(bytes_of(part))
                file.flush()
                return out, np.memmap(file, bits_dtype(out), mode="r")
        except OSError as error:
            raise LewisError(
                f"{store.home()}: cannot write the rows of {name!r} in their new order: {error.strerror}; free space"
            ) from error

    def _parts(self, dtype: str, own: np.ndarray, lent: _LentRows, out: str) -> Iterator[torch.Tensor]:
        """The rows in their new order; those of padding are the mean of the others, if that is asked for."""
        run, rows = max(_RUN // max(own.shape[1], 1), 1), self._rows[: self._mean_from]
        total = torch.zeros(own.shape[1], dtype=torch.float64)
        for start in range(0, len(rows), run):
            taken = rows[start : start + run]
            part = as_tensor(dtype, own[taken.clip(0)]).to(torch_dtype(out))
            missing = np.flatnonzero(taken < 0)
            part[torch.from_numpy(missing)] = lent.read(start + missing).to(part.dtype)
            if self._mean_from is not None:
                total += part.sum(dim=0, dtype=torch.float64)
            yield part
        padding = len(self._rows) - len(rows)
        for start in range(0, padding, run):
            yield (total / len(rows)).float().expand(min(run, padding - start), -1)

    def will_need(self, name: str) -> None:
        """As of the model."""
        self.model.will_need(name)

    def done_with(self, name: str) -> None:
        """As of the model; what was written for it is gone."""
        self._copies.pop(name, None)
        self.model.done_with(name)

    def _touches(self, name: str) -> bool:
        # A head that the base ties not may be tied here.
        return name in self._names or self.tied.get(name, name) in self._names


class _Lent:
    """What models take for the tokens that they lack: rows of the others, by one rule for all."""

    def __init__(self, models: Sequence[Model], origins: Mapping[int, Origin]) -> None:
        self._models, self._origins = models, origins

    def of(self, name: str, rows: np.ndarray) -> _LentRows:
        """These rows of one tensor."""
        models = {model for row in rows.tolist() for model, _ in self._origins[row]}
        return _LentRows({i: _matrix(self._models[i], name) for i in sorted(models)}, self._origins, rows)


class _LentRows:
    """Rows of one tensor that a model has not itself.

    Attributes:
        dtypes: those that hold them exactly.
    """

    def __init__(
        self, lenders: Mapping[int, tuple[str, np.ndarray]], origins: Mapping[int, Origin], rows: np.ndarray
    ) -> None:
        self._lenders, self._origins = lenders, origins
        means = any(len(origins[row]) > 1 for row in rows.tolist())
        self.dtypes = {"F32"} if means else {dtype for dtype, _ in lenders.values()}

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Some of them, in fp32, one row each."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows.tolist()):
            for model, number in self._origins[row]:
                wanted.setdefault(model, []).append((place, number))
        width = next((matrix.shape[1] for _, matrix in self._lenders.values()), 1)
        result = torch.zeros(len(rows), width)
        for model, pairs in sorted(wanted.items()):
            places, numbers = (np.array(column) for column in zip(*pairs, strict=True))
            dtype, matrix = self._lenders[model]
            result[torch.from_numpy(places)] += as_tensor(dtype, matrix[numbers]).to(torch.float32)
        counts = [max(len(self._origins[row]), 1) for row in rows.tolist()]
        return result / torch.tensor(counts).reshape(-1, 1)


def _match(
    target: Target, ids: Sequence[Mapping[str, int]], sizes: Sequence[int], source: int, has_base: bool
) -> tuple[list[np.ndarray], dict[int, Origin]]:
    """Each model's own row for every row of the target, -1 for none; and what stands in where one has none.

    A token's row is lent by the base if it has it, else it is the mean of those that have it. A row of padding is the
    model's own, if it is padding there too, else the source's.
    """
    maps = [np.full(target.rows, -1, np.int64) for _ in ids]
    tokens = np.zeros(target.rows, np.bool_)
    tokens[list(target.ids.values())] = True
    for own, vocabulary, rows in zip(maps, ids, sizes, strict=True):
        for token, row in target.ids.items():
            own[row] = vocabulary.get(token, -1)
        free = ~tokens[:rows]
        free[[row for row in vocabulary.values() if row < len(free)]] = False
        own[: len(free)][free] = np.flatnonzero(free)
    lent: dict[int, Origin] = {}
    for row in np.flatnonzero(np.min(maps, axis=0) < 0).tolist():
        have = [model for model, own in enumerate(maps) if own[row] >= 0]
        if not tokens[row]:
            have = [source] if source in have else []
        elif has_base and 0 in have:
            have = [0]
        lent[row] = tuple((model, int(maps[model][row])) for model in have)
    return maps, lent


def _origin(
    token: str,
    source: str | TokenRow,
    by_name: Mapping[str, Model],
    models: Sequence[Model],
    ids: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
) -> Origin:
    """The row that a recipe's `tokenizer.tokens` names for a token."""
    where = f"tokenizer.tokens.{token}.source"
    wanted: str | int = token
    if isinstance(source, TokenRow):
        if source.kind == "zero":
            return ()
        wanted = source.token if source.token is not None else source.token_id or 0
        source = str(source.model)
    number = models.index(_find(source, by_name, where))
    row = ids[number].get(wanted) if isinstance(wanted, str) else wanted if wanted < sizes[number] else None
    if row is None:
        raise InputError(f"{where}: {source} has no row of the token {wanted!r}")
    return ((number, row),)


def _find(name: str, by_name: Mapping[str, Model], where: str) -> Model:
    if name not in by_name:
        raise InputError(f"{where}: expected one of the models, {', '.join(by_name)}; got {name!r}")
    return by_name[name]


def _rows_of(model: Model, names: Collection[str]) -> int:
    """How many rows a model's embeddings have; 0 if it has none, or they differ."""
    stored = {model.tied.get(name, name) for name in names}
    found = {model.tensors[name].shape[:1] for name in stored if name in model.tensors}
    return found.pop()[0] if len(found) == 1 and () not in found else 0


def _matrix(model: Model, name: str) -> tuple[str, np.ndarray]:
    """A tensor's dtype and bits, one row per token."""
    dtype, bits = model.raw(name)
    return dtype, bits.reshape(model.tensors[model.tied.get(name, name)].shape[0], -1)
