"""Fit the stacked experts of a mixture in forward order, once all passes wait in front of their module.

The router of the merged model need not send a token where that of an expert model sends it, so the two cannot be
compared token by token. Each of the stacked experts is fitted to give, for the inputs that it gets in the merged model,
what it would give there with the weights of the expert model (`regression` with Z_t = X_t). The parameters of a module
are fitted in the order in which it uses them, each for the inputs that it gets from those fitted before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from lewis.errors import LewisError
from lewis.importance.gram_files import Collected, unpacked
from lewis.importance.passes import see_experts
from lewis.lazy_torch import torch
from lewis.merging.calibration_rows import warn_of_few_tokens
from lewis.merging.fitting.passes import Shared
from lewis.merging.fitting.static_solver import Group, parts_of, solve_group
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.tokens import Gram, Rows
from lewis.models.network.module_tree import Network

Stacks = Mapping[str, Mapping[str, Group]]
"""Path of a module -> each of its stacked parameters -> the checkpoint tensors that this is made of."""


def stacks_of(network: Network, merge: Prepared) -> Stacks:
    """Find the modules with stacked experts that can be fitted."""
    found = dict[str, dict[str, Group]]()
    for each in network.covered:
        stacked = network.empty(each.parameter).dim() == 3
        if stacked and merge.merges(each.tensor) and len(network.same(each.parameter)) == 1:
            path = each.parameter.rpartition(".")[0]
            found.setdefault(path, {}).setdefault(each.parameter, []).append((each, parts_of(network, each)))
    return found


def tensors_in(stacks: Stacks) -> list[str]:
    """Names of the checkpoint tensors of all stacks."""
    return [each.tensor for parameters in stacks.values() for group in parameters.values() for each, _ in group]


class StackedFit:
    """Fits the stacked experts of a module once all passes wait in front of it."""

    def __init__(self, shared: Shared, stacks: Stacks) -> None:
        """
        Args:
            shared: the merge, its models and the passes.
            stacks: the stacked experts that can be fitted.
        """
        self._shared, self._stacks = shared, stacks
        self._seen: list[dict[str, tuple[int, int]]] = [{} for _ in shared.pairs]

    def __contains__(self, path: str) -> bool:
        return path in self._stacks

    def fit(self, path: str) -> None:
        """Fit the stacked parameters of a module that are not fitted yet, and load them into the merged model.

        Raises:
            LewisError: naming the tensor, if inputs or the result are not finite.
        """
        left = dict(self._stacks[path])
        while any(covered.tensor not in self._shared.fitted for group in left.values() for covered, _ in group):
            parameter, noted = self._noted(path, left)
            if parameter is None:
                break  # no token reaches the remaining stacks
            group = [each for each in left.pop(parameter) if each[0].tensor not in self._shared.fitted]
            group.sort(key=lambda each: each[1][0].projection)  # tensors that share their inputs follow each other
            for seen, each in zip(self._seen, noted, strict=True):
                seen |= {part.projection: each.size_of(part.projection) for _, parts in group for part in parts}
            found = dict(solve_group(self._shared.merge, noted, group, jobs=self._shared.workers))
            if found:
                self._shared.fitted.add(parameter, found)
            self._shared.merged.load([parameter])

    def warn(self) -> None:
        """Warn of stacked experts that few calibration tokens reached."""
        for expert, seen in zip(self._shared.merge.experts, self._seen, strict=True):
            warn_of_few_tokens(expert.ref, seen)

    def _noted(self, path: str, wanted: Mapping[str, Group]) -> tuple[str | None, list[_Noted]]:
        """Run the module in the merged model's passes; return which wanted parameter it uses first, and its inputs."""
        passes = [pair.merged for pairs in self._shared.pairs for pair in pairs]
        firsts, rows = dict[int, str](), [list[tuple[str, torch.Tensor]]() for _ in passes]
        module = self._shared.merged.network.module.get_submodule(path)

        def run(i: int) -> None:
            def note(parameter: str, projection: str, inputs: torch.Tensor) -> None:
                if firsts.setdefault(i, parameter) == parameter:
                    rows[i].append((projection, passes[i].batch.rows_of(inputs, projection)))

            call = passes[i].call
            assert call is not None
            with see_experts(module, list(wanted), note):
                call()

        self._shared.workers([partial(run, i) for i in range(len(passes))])
        if len(set(firsts.values())) > 1:
            raise LewisError(
                f"{path}: this module does not use its parameters in one order for every text; use another merge_method"
            )
        noted, begin = list[_Noted](), 0
        for pairs in self._shared.pairs:
            noted.append(_Noted(sum(pair.merged.batch.tokens for pair in pairs)))
            for each in rows[begin : begin + len(pairs)]:
                self._shared.workers([job for projection, inputs in each for job in noted[-1].add(projection, inputs)])
            begin += len(pairs)
        return next(iter(firsts.values()), None), noted


class _Noted:
    """The inputs of one stacked parameter in the passes of one expert's rows, with the interface of `Grams`."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._collected = tokens, dict[str, Collected]()
        self._results = dict[str, dict[str, list[torch.Tensor]]]()

    def add(self, projection: str, rows: torch.Tensor) -> list[Callable[[], None]]:
        """Add inputs of one stacked expert, as `Collected.add`."""
        collected = self._collected.setdefault(projection, Collected(rows.shape[1], self._tokens))
        return collected.add([rows])

    def __contains__(self, projection: str) -> bool:
        return projection in self._collected

    def size_of(self, projection: str) -> tuple[int, int]:
        """How many tokens reached a projection, and how many inputs it has; (0, 0) without tokens."""
        found = self._collected.get(projection)
        return (found.tokens, found.size) if found else (0, 0)

    def source(self, projection: str) -> str | None:
        return projection if projection in self else None

    def inputs(self, projection: str, weight: float = 1.0) -> Gram | Rows:
        collected = self._collected[projection]
        if projection not in self._results:
            self._results[projection] = collected.result()
        result = self._results[projection]
        if "rows" in result:
            return Rows(result["rows"], result["rows"], weight)
        return Gram(unpacked(result["gram"][0], collected.size), collected.tokens, weight)
