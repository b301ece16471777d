"""Find the tensors of a base that hold the parameters of its network which an adapter changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lewis.lazy_torch import nn, torch
from lewis.models.names import PER_TOKEN, Shapes
from lewis.models.network.placing import Layout, Run
from lewis.rehearsal.question import UnfitError

MERGE = "merge it into its base with PEFT's merge_and_unload first"
_OTHER = "expected an adapter of this base model"
_ORDER = ("whole", "low_rank", "bias", "rows")  # in which changes are made


@dataclass(frozen=True)
class Change:
    """A change that an adapter makes to a parameter.

    Attributes:
        kind: `whole`, `low_rank`, `bias` or `rows`, as the classes of `delta`.
        parameter: that is changed or, if it is saved whole, that takes its place.
        data: keys of the adapter's file and numbers, for the answer.
        name: of the parameter, where the adapter is put on one of several tied ones; empty if any name will do.
        run: the elements of the parameter that are changed; None for all.
        shape: of what is changed, if it is not the parameter's.
    """

    kind: str
    parameter: torch.Tensor
    data: Mapping[str, Any]
    name: str = ""
    run: Run | None = None
    shape: tuple[int, ...] | None = None


class Places:
    """The parameters of a network, and the base's tensors that hold them.

    Attributes:
        parameters: name -> parameter or saved buffer, before an adapter is put on.
    """

    def __init__(self, network: nn.Module, base: Shapes, tied: Mapping[str, str], *, converts: bool) -> None:
        """
        Args:
            network: of the base.
            base: the shapes of its tensors.
            tied: its tied names.
            converts: whether transformers may know other names for the tensors.
        """
        self.parameters: dict[str, torch.Tensor] = network.state_dict(keep_vars=True)
        self._network, self._base, self._tied = network, base, tied
        stored = {**base, **{name: base[of] for name, of in tied.items() if of in base}}
        self._layout = Layout(network, stored) if converts else None
        groups: dict[int, list[str]] = {}
        for name, value in self.parameters.items():
            groups.setdefault(id(value), []).append(name)
        self._aliases = {name: names for names in groups.values() for name in names}
        output = getattr(network, "get_output_embeddings", lambda: None)()
        heads = [f"{path}.weight" for path, module in network.named_modules() if module is output is not None]
        self._tied_heads = {name for name in (*heads, *tied) if len(self._aliases.get(name, ())) > 1}

    def of_conversion(self, keys: Sequence[str], weights: Shapes, scales: Mapping[int, float]) -> Iterator[Change]:
        """The changes by factors that PEFT joins, such as those of single experts, each to its part of a parameter.

        Args:
            keys: in the adapter's file.
            weights: the shapes of its tensors.
            scales: identity of a parameter -> scale of its factors.
        """
        pairs: dict[str, dict[str, str]] = {}
        for key in keys:
            module, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            pairs.setdefault(f"{module}.weight", {})[part[:1].lower()] = key
        shapes = {n: (weights[p["b"]][0], weights[p["a"]][1]) for n, p in pairs.items() if p.keys() == {"a", "b"}}
        runs = Layout(self._network, shapes).runs
        for name, shape in shapes.items():
            for run in runs.get(name, ()):
                parameter = self.parameters[run.name]
                if (scale := scales.get(id(parameter))) is not None:
                    data = {**pairs[name], "scale": scale, "transposed": False, "magnitude": None, "stack": 0}
                    yield Change("low_rank", parameter, data, run.name, run, shape)

    def rows(self, changes: Iterable[Change], merged: nn.Module) -> dict[str, Any]:
        """The changes of the base's tensors, as the answer has them.

        Args:
            changes: of parameters.
            merged: the network, with the adapter merged.

        Raises:
            UnfitError: for a change that no tensor of the base can hold.
        """
        after: dict[str, torch.Tensor] = merged.state_dict(keep_vars=True)
        if after.keys() != self.parameters.keys():
            raise UnfitError(
                f"PEFT makes {len(after)} tensors of the base's {len(self.parameters)} (layer_replication), which no "
                f"merge of the base's tensors gives; {MERGE}"
            )
        names: dict[int, str] = {}
        for name, value in after.items():
            names.setdefault(id(value), name)
        kept = [change for change in changes if id(change.parameter) in names]
        rows = [self._row(change.name or names[id(change.parameter)], change) for change in kept]
        rows.sort(key=lambda row: _ORDER.index(row["kind"]))
        self._check_shapes(rows)
        whole = {id(change.parameter) for change in kept if change.kind == "whole"}
        groups = {id(group): group for group in self._aliases.values()}.values()
        untied = [group for group in groups if len({id(after[name]) for name in group}) > 1]
        for group in untied:
            replaced = [name for name in group if id(after[name]) in whole]
            if left := [name for name in group if name not in replaced]:
                why = "are tied in the base, and what the adapter has replaces only one of them"
                raise UnfitError(f"{replaced[0]!r} and {left[0]!r} {why}; {MERGE}")
        return {"changes": rows, "untied": bool(untied)}

    def _check_shapes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check that each change has the shape of the base's tensor, or of the embedding that the adapter brings."""
        single = [(row["parts"][0][0], row) for row in rows if row["parts"][0][4]]
        brought = {tensor: row["shape"] for tensor, row in single if row["kind"] == "whole"}
        for tensor, row in single:
            own = list(self._base[tensor])
            expected = brought.get(tensor, own)
            resized = expected[1:] == own[1:] and tensor.endswith(PER_TOKEN)
            if row["shape"] != expected or not (expected == own or resized):
                raise UnfitError(f"{row['parameter']!r} is {row['shape']}, in the base it is {own}; {_OTHER}")

    def _row(self, name: str, change: Change) -> dict[str, Any]:
        shape, data = change.shape or tuple(change.parameter.shape), change.data
        if name in self._tied_heads and change.kind != "whole":
            raise UnfitError(f"it changes the head {name!r}, which the base ties to its embedding; {MERGE}")
        parts = self._parts(name, change, prod(shape))
        needs_whole = change.kind == "rows" or (data.get("magnitude") and data["transposed"])
        if needs_whole and not parts[0][4]:
            raise UnfitError(f"it changes all of {name!r}, which the base stores in several tensors; {MERGE}")
        return {"kind": change.kind, "parameter": name, "shape": list(shape), **data, "parts": parts}

    def _parts(self, name: str, change: Change, size: int) -> list[list[Any]]:
        """The base's tensors that hold a parameter, or a part of it, as the answer has them."""
        for each in self._aliases[name]:
            sources = [] if self._layout is None else self._layout.placing.sources.get(each, [])
            same = sources[0][0] if len(sources) == 1 and sources[0][1] is None else each
            if change.run is None and (stored := self._tied.get(same, same)) in self._base:
                return [[stored, 0, size, 0, True]]
            parts, place = list[list[Any]](), 0
            for run in self._layout.tensors_of(change.run or Run(each, 0, size)) or () if self._layout else ():
                alone = run.size == size == prod(self._base[run.name])
                parts.append([run.name, run.start, run.stop, place, alone])
                place += run.size
            if parts:
                return parts
        raise UnfitError(f"it changes {name!r}, which the base has no tensor for; {_OTHER}")
