"""The vocabulary of a merge: which row of each model's embeddings belongs to which token of the result."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lewis import store
from lewis.errors import InputError
from lewis.importance.calibration import Calibration
from lewis.merging.vocabulary.aligned import Aligned, Lenders, Origin, embedding_rows
from lewis.merging.vocabulary.tokens import Target, plain_entry, union
from lewis.models.model import Model
from lewis.models.names import EMBEDDINGS, PER_TOKEN
from lewis.models.tokenizer import read_vocabulary, same, tokenizer_folder, vocabulary_of
from lewis.recipe.tokenizer import Tokenizer, TokenRow


@dataclass(frozen=True)
class Alignment:
    """The vocabulary of a merge's result, and the models with their rows in its order.

    Attributes:
        donor: folder whose tokenizer and generation config the result gets.
        source: the model whose tokenizer it is.
        target: the result's vocabulary; None if the models have the same one and nothing has to be done.
        views: `id()` of a model -> the model with its rows in the order of `target`.
        digest: identity of the mapping of rows; None if nothing has to be done.
    """

    donor: Path
    source: Model
    target: Target | None = None
    views: Mapping[int, Model] = field(default_factory=dict)
    digest: str | None = None

    def of(self, model: Model) -> Model:
        """Return the view of a model in the result's vocabulary; the model itself if nothing has to be done."""
        return self.views.get(id(model), model)

    def translate(self, ref: str, base: Model, expert: Model, calibration: Calibration) -> Calibration:
        """Translate a calibration set from the base's token ids to those of the result, in which the expert is read.

        Args:
            ref: the expert's reference, for the error message.
            base: the model whose token ids the set has, as given to `align`.
            expert: the expert that is run on the set, as given to `align`.
            calibration: the set.

        Raises:
            InputError: if the result or the expert lacks one of the set's tokens.
        """
        read, there = self.of(base), self.of(expert)
        if not isinstance(read, Aligned) or not isinstance(there, Aligned):
            return calibration
        places = {int(own): place for place, own in enumerate(read.rows) if own >= 0}
        for token in sorted({token for sample in calibration.samples for token in sample}):
            if token not in places or there.rows[places[token]] < 0:
                names = {number: name for name, number in (read_vocabulary(tokenizer_folder(base)) or {}).items()}
                who = "this expert's vocabulary" if token in places else "the result's vocabulary"
                raise InputError(
                    f"{ref}: its calibration rows have the token {names.get(token, token)!r}, which {who} lacks: the "
                    "merge sends the same tokens through the expert and the merged model; leave such rows out, bring "
                    "the expert to the base's vocabulary, or use a merge_method that needs no calibration rows"
                )
        samples = tuple(tuple(places[token] for token in sample) for sample in calibration.samples)
        return replace(calibration, samples=samples)

    def finish(self, folder: Path) -> None:
        """Adapt the config and tokenizer in `folder`, copies of the base's and donor's, to the result's vocabulary."""
        generation = self.source.home / "generation_config.json"  # an adapter has none
        if self.donor != self.source.home and generation.is_file() and not (folder / generation.name).exists():
            shutil.copyfile(generation, folder / generation.name)
        if self.target is not None:
            self.target.finish(folder, self.source.config)


def align(
    policy: Tokenizer | None, base_ref: str | None, base: Model, experts: Sequence[tuple[str, Model]]
) -> Alignment:
    """Match the rows of the models' embeddings and heads by token.

    Args:
        policy: whose tokens the result has; None: the base's, which all models must have.
        base_ref: the base's reference; None if there is no base.
        base: the base; the first model, if there is none.
        experts: reference and model, in the order of their keys.

    Raises:
        InputError: if a tokenizer that is needed cannot be read.
    """
    if policy is None:
        return Alignment(tokenizer_folder(base), base)
    by_ref = {**({} if base_ref is None else {base_ref: base}), **dict(experts)}
    source = base if policy.source in ("base", "union") else _find(policy.source, by_ref, "tokenizer.source")
    plain = Alignment(tokenizer_folder(source), source)
    models = list({id(model): model for model in (base, *(model for _, model in experts))}.values())
    found = any(name.endswith(EMBEDDINGS) for name in base.tensors)  # a head alone must not be moved
    names = [name for name in (*base.tensors, *base.tied) if found and name.endswith(PER_TOKEN)]
    sizes = [embedding_rows(model, names) for model in models]
    known = _vocabulary_to_match(policy, plain.donor, models, sizes)
    if known is None:
        return plain
    ids = [vocabulary_of(model, known, rows) for model, rows in zip(models, sizes, strict=True)]
    chosen = models.index(source)
    target = _target(policy, read_vocabulary(plain.donor) or known, models, ids, chosen, sizes[chosen])
    maps, lent = _match(target, ids, sizes, chosen, has_base=base_ref is not None)
    for token, embedding in policy.tokens.items():
        if embedding.source is not None:
            row = target.ids[token]
            lent[row] = _origin(token, embedding.source, by_ref, models, ids, sizes)
            for own in maps if embedding.force else ():
                own[row] = -1
    if _changes_nothing(target, sizes, maps):
        return plain
    lenders = Lenders(models, lent)
    views = {id(m): Aligned(m, names, own, lenders, target) for m, own in zip(models, maps, strict=True)}
    digest = store.digest([[own.tolist() for own in maps], sorted(lent.items()), target.padded_from, target.added])
    return replace(plain, target=target, views=views, digest=digest)


def _vocabulary_to_match(
    policy: Tokenizer, donor: Path, models: Sequence[Model], sizes: Sequence[int]
) -> Mapping[str, int] | None:
    """Return the vocabulary (token -> id) of the first model, the base; None if no rows have to be matched.

    Raises:
        InputError: if rows have to be matched and cannot be.
    """
    of_one_size, plain = len(set(sizes)) == 1, not policy.tokens and policy.pad_to_multiple_of is None
    if of_one_size and plain and all(same(donor, tokenizer_folder(model)) for model in models):
        return None
    folder = tokenizer_folder(models[0])
    known = read_vocabulary(folder)
    if plain and (min(sizes) == 0 or (known is None and of_one_size)):
        vocabularies = [each for model in models if (each := read_vocabulary(tokenizer_folder(model))) is not None]
        if all(each == vocabularies[0] for each in vocabularies):
            return None  # a tensor that a model lacks is reported later, with all else that does not fit
    if known is None:
        raise InputError(f"{folder}: no tokenizer.json; the models' embeddings cannot be matched")
    if min(sizes) == 0:
        raise InputError(
            f"{models[list(sizes).index(0)].folder}: its rows cannot be matched by token: expected an embedding named "
            f"{', '.join(EMBEDDINGS)}, and a head with as many rows, if it has one; leave tokenizer_source and "
            "tokenizer out, and merge models of one vocabulary"
        )
    return known


def _changes_nothing(target: Target, sizes: Sequence[int], maps: Sequence[np.ndarray]) -> bool:
    """Whether every model has the rows of the target already, in their order."""
    size = target.rows
    unmoved = [rows == size and np.array_equal(own, np.arange(size)) for rows, own in zip(sizes, maps, strict=True)]
    return all(unmoved) and not target.added and target.padded_from == size


def _target(
    policy: Tokenizer,
    donated: Mapping[str, int],
    models: Sequence[Model],
    ids: Sequence[Mapping[str, int]],
    chosen: int,
    rows: int,
) -> Target:
    """Return the result's vocabulary: its tokens, the row of each, and the padding."""
    added = union(models[0], models[1:], ids[1:]) if policy.source == "union" else []
    there = {**donated, **{entry["content"]: entry["id"] for entry in added}}
    after = 1 + max(there.values(), default=-1)
    new = [plain_entry(token, after + i) for i, token in enumerate(sorted(policy.tokens.keys() - there.keys()))]
    there |= {entry["content"]: entry["id"] for entry in new}
    has_row = set[str]().union(policy.tokens, *(ids if policy.source == "union" else [ids[chosen]]))
    wanted = {token: row for token, row in there.items() if token in has_row}
    count, pad = 1 + max(wanted.values(), default=-1), policy.pad_to_multiple_of
    if pad:
        return Target(wanted, -(-count // pad) * pad, count, added + new)
    size = max(count, rows)
    return Target(wanted, size, size, added + new)


def _match(
    target: Target, ids: Sequence[Mapping[str, int]], sizes: Sequence[int], source: int, *, has_base: bool
) -> tuple[list[np.ndarray], dict[int, Origin]]:
    """Find each model's own row for every row of the target, -1 if it has none, and the origin of each lacking row.

    The row of a token that a model lacks is the base's, if the base has the token, else the mean of the rows of the
    models that have it. A row of padding is the model's own, if it is padding there too, else the source's.
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
    by_ref: Mapping[str, Model],
    models: Sequence[Model],
    ids: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
) -> Origin:
    """Return the row that a recipe's `tokenizer.tokens` gives to a token, as an `Origin`."""
    where = f"tokenizer.tokens.{token}.source"
    wanted: str | int = token
    if isinstance(source, TokenRow):
        if source.kind == "zero":
            return ()
        wanted = source.token if source.token is not None else source.token_id or 0
        source = str(source.model)
    number = models.index(_find(source, by_ref, where))
    row = ids[number].get(wanted) if isinstance(wanted, str) else wanted if wanted < sizes[number] else None
    if row is None:
        raise InputError(f"{where}: {source} has no row of the token {wanted!r}")
    return ((number, row),)


def _find(ref: str, by_ref: Mapping[str, Model], where: str) -> Model:
    if ref not in by_ref:
        raise InputError(f"{where}: expected one of the models, {', '.join(by_ref)}; got {ref!r}")
    return by_ref[ref]
