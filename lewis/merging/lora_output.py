"""Write a merge as a PEFT LoRA adapter: the merged delta of each linear module, truncated to a low rank.

Each thread has one delta in memory at a time, and all threads together no more elements than the largest tensor. The
factors are kept on disk until all ranks are known, since a safetensors file begins with the shapes of its tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from lewis import store
from lewis.devices import one_thread
from lewis.errors import InputError
from lewis.importance.workers import Workers
from lewis.lazy_torch import nn, torch
from lewis.merging.adapter import Adapter, Found, factor_bytes, factorise
from lewis.merging.fitting.fitted import Fitted
from lewis.merging.memory_budget import MemoryBudget
from lewis.merging.prepared import Prepared
from lewis.models.files.folder import SINGLE
from lewis.models.files.writer import CheckpointWriter
from lewis.models.lora.expert import WEIGHTS
from lewis.models.lora.question import CONFIG
from lewis.models.network.module_tree import Network

_PREFIX = "base_model.model."
_NONE = "dummy-target-modules"  # PEFT's name for no module at all, since it takes no empty list
_PART = 1 << 20  # elements of a temporary tensor
_FACTORS = ".factors"  # folder of factors until they are written to the adapter's file

Merged = Callable[[str], torch.Tensor]
"""Returns the merged tensor of a name, in fp32."""


class AdapterWriter:
    """Writes the LoRA adapter of one merge."""

    def __init__(self, merge: Prepared, report: Callable[[str], None]) -> None:
        """Find the module of each merged tensor.

        Args:
            merge: the merge whose output is an adapter.
            report: called with the name of each tensor when it is done, one call at a time, in any thread.

        Raises:
            InputError: if transformers cannot build the base.
        """
        self._merge = merge
        # Prefect's progress looks up the task that is running in the caller's context, which other threads do not have.
        context = copy_context()
        self._report: Callable[[str], None] = lambda name: context.run(report, name)
        self._output = merge.settings.output
        self._network = Network(merge.base.home, merge.base.shapes, torch.float32)
        self._modules = dict(self._network.module.named_modules())
        self._head = self._network.module.get_output_embeddings()
        names = [name for name in merge.layout if merge.merges(name) and merge.base.tensors[name].elements]
        places = self._network.unconverted
        self._places = {name: places.get(name) for name in names}
        # Not the merge's budget: a merge in torch would wait there for the memory that this delta holds.
        self._budget = MemoryBudget(max((merge.base.tensors[name].elements for name in names), default=0))
        self._found, self._lock = Found(), Lock()

    @property
    def size(self) -> int:
        """The most bytes that the factors take on disk, where they are written twice; 0 if `rank` sets no limit."""
        tensors = self._merge.base.tensors
        shapes = {name: tensors[name].shape for name in self._places if self._kind(name) == "factored"}
        return 2 * factor_bytes(shapes, self._output.rank) if self._output.rank else 0

    def check(self, merged: Merged) -> None:
        """Check that the merge leaves the tensors unchanged that an adapter cannot hold, such as norms.

        Raises:
            InputError: naming a tensor that changes, or that changes by more than `output.tolerance`, if it is set.
        """
        with one_thread():
            for name in self._places:
                if self._kind(name) == "unheld":
                    self._leave_out(name, merged)

    def write(self, folder: Path, merged: Merged, threads: int | None = None) -> tuple[Adapter, str]:
        """Write `adapter_config.json` and `adapter_model.safetensors`; call `check` first.

        Args:
            folder: the folder that the files are written to.
            merged: returns the merged tensors.
            threads: by default one per core; any number gives the same bytes.

        Returns:
            What the adapter holds, and the SHA-256 of its weights.

        Raises:
            InputError: if the merge changes nothing.
            LewisError: as the merge.
        """
        factors = Fitted(folder / _FACTORS)
        kinds = {name: self._kind(name) for name in self._places}
        jobs = [partial(self._factorise, name, factors, merged) for name, kind in kinds.items() if kind == "factored"]
        jobs += [partial(self._compare, name, merged) for name, kind in kinds.items() if kind == "whole"]
        for name in self._merge.layout.keys() - {name for name, kind in kinds.items() if kind != "unheld"}:
            self._report(name)  # `check` has seen it, or it is excluded
        with Workers(threads) as workers:
            workers(jobs)
        found = self._found
        if not found.ranks and not found.whole:
            raise InputError(f"{self._merge.settings.base}: the merge changes nothing, so there is no adapter to write")
        saved = self._saved()
        shapes = found.shapes | {key: self._merge.base.tensors[name].shape for key, name in saved.items()}
        layout = {key: ("F32", shapes[key]) for key in sorted(shapes)}
        size = 1 + sum(4 * math.prod(shape) for shape in shapes.values())
        with CheckpointWriter(folder, layout, size) as writer:
            for key in writer.names:
                writer.write(key, factors.read(key) if key in factors else merged(saved[key]).float())
                writer.finish(key)
        (folder / SINGLE).rename(folder / WEIGHTS)
        store.discard(factors.folder)
        adapter = found.adapter()
        store.write_json(folder / CONFIG, self._config(adapter))
        return adapter, writer.checksums[SINGLE]

    def _kind(self, name: str) -> str:
        """How an adapter holds a tensor: `factored` if it is linear, `whole` (embeddings and the head), or `unheld`."""
        path, _, kind = (self._places[name] or "").rpartition(".")
        module = self._modules.get(path) if path else None
        if module is not None and (isinstance(module, nn.Embedding) or module is self._head):
            return "whole"
        return "factored" if kind == "weight" and (isinstance(module, nn.Linear) or _is_conv1d(module)) else "unheld"

    def _delta(self, name: str, merged: Merged) -> torch.Tensor:
        delta = merged(name)
        for part, old in zip(_parts(delta), _parts(self._merge.base.read(name)), strict=True):
            part.sub_(old.float())
        return delta

    def _leave_out(self, name: str, merged: Merged) -> None:
        moved, norm = _norm(self._delta(name, merged)), _norm(self._merge.base.read(name))
        tolerance = self._output.tolerance or 0.0
        if moved > tolerance * norm:
            share = f"by {moved / norm:.2g} of its norm" if norm else "from 0"
            raise InputError(
                f"{name}: the merge changes it {share}, and a LoRA adapter cannot hold it: it holds the weights of "
                f"linear modules, embeddings and the head; exclude it (exclude: [{name}]), set output.tolerance above "
                "that share, or write the full model (output.kind: full)"
            )
        if moved:
            self._found.left_out[name] = moved / norm
            self._found.deltas[name] = self._found.lefts[name] = moved**2

    def _factorise(self, name: str, factors: Fitted, merged: Merged) -> None:
        module = (self._places[name] or "").removesuffix(".weight")
        with self._budget.take(self._merge.base.tensors[name].elements):
            delta = self._delta(name, merged)
            if delta.any():
                made = factorise(
                    delta.T if _is_conv1d(self._modules[module]) else delta, self._output.rank, self._output.tolerance
                )
                parts = {f"{_PREFIX}{module}.lora_A.weight": made.a, f"{_PREFIX}{module}.lora_B.weight": made.b}
                with self._lock:
                    factors.add(module, parts)
                    self._found.ranks[module] = len(made.a)
                    self._found.errors[module] = made.left / made.norm
                    self._found.deltas[name], self._found.lefts[name] = made.norm**2, made.left**2
                    self._found.shapes |= {key: tuple(part.shape) for key, part in parts.items()}
        with self._lock:
            self._report(name)

    def _compare(self, name: str, merged: Merged) -> None:
        with self._budget.take(self._merge.base.tensors[name].elements):
            moved = _norm(self._delta(name, merged))
        with self._lock:
            if moved:
                # A tied head is a module of its own in PEFT: it is saved as well.
                paths = {each.rpartition(".")[0] for each in self._network.same(self._places[name] or "")}
                self._found.whole |= paths
                self._found.deltas[name] = moved**2
            self._report(name)

    def _saved(self) -> dict[str, str]:
        """Key in the adapter file -> name of the merged tensor, for all parameters of modules that are saved whole."""
        parameters = {parameter: name for name, parameter in self._network.unconverted.items()}
        found: dict[str, str] = {}
        for path in self._found.whole:
            for own, _ in self._modules[path].named_parameters(recurse=False):
                names = [parameters[each] for each in self._network.same(f"{path}.{own}") if each in parameters]
                found |= {f"{_PREFIX}{path}.{own}": name for name in names}
        return found

    def _config(self, adapter: Adapter) -> dict[str, Any]:
        transposed = {_is_conv1d(self._modules[module]) for module in adapter.ranks}
        if len(transposed) > 1:
            raise InputError(
                f"{self._merge.settings.base}: it has both Linear and Conv1D modules, which one adapter cannot hold; "
                "write the full model (output.kind: full)"
            )
        usual = Counter(adapter.ranks.values()).most_common(1)[0][0] if adapter.ranks else 1
        others = {module: rank for module, rank in adapter.ranks.items() if rank != usual}
        name, _, revision = self._merge.base_name.partition("@")
        if Path(self._merge.base_name).is_absolute():
            name, revision = self._merge.base_name, ""
        return {
            "peft_type": "LORA",
            "task_type": "SEQ_2_SEQ_LM" if self._network.encodes else "CAUSAL_LM",
            "base_model_name_or_path": name,
            "revision": revision or None,
            "r": usual,
            "lora_alpha": usual,  # alpha / r = 1: the factors are the delta itself
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": _short(adapter.ranks, self._modules) or _NONE,
            "modules_to_save": adapter.whole or None,
            "fan_in_fan_out": transposed == {True},
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.view(-1).split(_PART)


def _norm(tensor: torch.Tensor) -> float:
    """The Frobenius norm, summed in fp64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in _parts(tensor)))


def _is_conv1d(module: nn.Module | None) -> bool:
    """Whether a module is GPT-2's linear module `Conv1D`, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D"


def _short(chosen: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules as `target_modules`: by the last part of their path if all modules that end in it are chosen."""
    of_name: dict[str, set[str]] = {}
    for path in modules:
        of_name.setdefault(path.rpartition(".")[2], set()).add(path)
    chosen = set(chosen)
    names = ((path, path.rpartition(".")[2]) for path in chosen)
    return sorted({last if of_name[last] <= chosen else path for path, last in names})
