"""The merge engine: streams tensor by tensor, knows no method by name.

Arithmetic is fp32 whatever the stored dtype, and the result is rounded once. Where the merged delta of an element is
exactly one expert's task vector, the result is that expert's own weight, and where it is 0, the base's: so one expert
at density 1 and weight 1 comes out byte by byte, and density 0 gives the base. Experts are put in the order of their
keys first, and random streams are keyed by (seed, expert key, tensor name): the order of a recipe changes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lewis import store
from lewis.allocation.scales import Densities, Scales
from lewis.errors import InputError, LewisError
from lewis.lazy_torch import torch
from lewis.merge import in_torch
from lewis.merge.alignment import align
from lewis.merge.memory_budget import Room
from lewis.methods import find
from lewis.methods.arithmetic.streams import Stream
from lewis.models.compatible import check_compatible
from lewis.models.config import write_config
from lewis.models.dtypes import MERGED, bytes_of, size_of
from lewis.models.files import copy_tokenizer, tokenizer_files
from lewis.models.model import Model
from lewis.models.names import layer_of
from lewis.models.writer import CheckpointWriter
from lewis.recipe.recipe import Recipe, excluded
from lewis.recipe.schema import ModelEntry

logger = logging.getLogger(__name__)
SEMANTICS = "6"  # bump when the same inputs would give other bytes
_COPIED = 1 << 22  # bytes that are copied at a time


@dataclass(frozen=True)
class Expert:
    """An opened expert and its recipe entry.

    Attributes:
        densities: if LEWIS guides the merge, its density per tensor.
        scales: if it is pruned by activation, what the magnitudes in its task vector are multiplied with to be ranked;
            tensors that are left out are ranked by magnitude.
    """

    entry: ModelEntry
    model: Model
    densities: Densities | None = None
    scales: Scales | None = None


class Merge:
    """A merge that has been checked and can be run.

    Attributes:
        layout: tensor name -> dtype and shape of the output.
        excluded: names of the tensors that are the base's own, in its dtype.
        digest: identity of the result: every input's key, every parameter that changes a byte, the code's semantics.
        size: bytes of the output's tensors.
        elements: of the output's tensors.
        room: for the tensors that are merged in torch at a time.
        traffic: bytes of the tensors of all inputs and of the output.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Model | None,
        experts: Sequence[Expert],
        held_back: Scales | None = None,
        device: str = "cpu",
    ) -> None:
        """Check that the models fit together and the recipe's filters match.

        Args:
            recipe: the recipe.
            base: the base, or None for a method on weights without one.
            experts: as `Recipe.experts`, opened.
            held_back: factors that merged deltas are multiplied with (`lewis.allocation.aim`); none for names left out.
            device: where the methods compute, by torch's name; on `cpu` in compiled loops where there are some. Part
                of the digest, as `lewis.devices.merge_device` says.

        Raises:
            InputError: naming every tensor, vocabulary or filter that does not fit.
        """
        self.device = device
        self.recipe, self.method, self.held_back = recipe, find(recipe.merge_method), held_back or {}
        experts_by_key = sorted(experts, key=lambda expert: expert.model.key)
        self.vocabulary = align(
            recipe,
            base or experts[0].model,
            [(e.entry.model, e.model) for e in experts_by_key],
            has_base=base is not None,
        )
        self.experts = [replace(expert, model=self.vocabulary.of(expert.model)) for expert in experts_by_key]
        self.base: Model = self.vocabulary.of(base or experts[0].model)
        self.adds_to_base = self.method.on == "task_vectors" or (self.method.on == "either" and base is not None)
        self.excluded = excluded(recipe, self.base.tensors, self.base.tied)
        check_compatible(
            self.base, [e.model for e in self.experts], self.excluded, by_token=recipe.vocabulary is not None
        )
        recipe.check_filters([*self.base.tensors, *self.base.tied])
        if self.excluded >= {name for name, info in self.base.tensors.items() if info.floating}:
            raise InputError("exclude: it matches every tensor; nothing is left to merge")
        self._layers = 1 + max((layer_of(name) or 0 for name in self.base.tensors), default=0)
        out = stored_dtype(recipe)
        self.layout = {
            name: (out if out and info.floating and name not in self.excluded else info.dtype, info.shape)
            for name, info in self.base.tensors.items()
        }
        self.size = sum(size_of(dtype, shape) for dtype, shape in self.layout.values())
        self.elements = sum(math.prod(shape) for _, shape in self.layout.values())
        inputs = {model.key: model for model in [self.base, *(expert.model for expert in self.experts)]}
        self.traffic = self.size + sum(
            size_of(info.dtype, info.shape) for model in inputs.values() for info in model.tensors.values()
        )
        self._check_parameters()
        self._check_scales()
        self.digest = self._digest()
        self._stopped = threading.Event()
        largest = max((info.elements for info in self.base.tensors.values()), default=0)
        self.room = Room(largest + largest // 4)  # small ones go beside the largest

    def run(
        self,
        folder: Path,
        *,
        max_shard_size: int = 5 * 10**9,
        manifest: Mapping[str, Any] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        threads: int | None = None,
    ) -> None:
        """Write the merged checkpoint to `folder`, which appears whole or not at all.

        If a process died (kill -9, power) that was writing the same to `folder`, it goes on from the tensors which that
        one has finished.

        Args:
            folder: where to; absent, empty, or an earlier output.
            max_shard_size: bytes.
            manifest: recorded in `lewis.json`, beside the digest.
            progress: called with (elements done, elements in all, tensor name).
            threads: how many tensors are merged at a time; by default one per core.

        Raises:
            InputError: if there is no space, or `folder` is one of the models, or holds something else.
            LewisError: naming the tensor and model of a value that is not finite; or if the disk fails.
        """
        models = [self.base, *(expert.model for expert in self.experts)]
        if folder.resolve() in {place.resolve() for model in models for place in (model.folder, model.home)}:
            raise InputError(f"{folder}: one of the models that are merged; choose another path")
        checksums: dict[str, str] = {}
        key = store.digest([self.digest, max_shard_size])
        try:
            with store.publish(folder, {"digest": self.digest, **(manifest or {})}, key, checksums) as scratch:
                store.check_space(folder, int(self.size * 1.01) + 10**7 - store.bytes_on_disk(scratch))
                with CheckpointWriter(scratch, self.layout, max_shard_size) as writer:
                    self.write_tensors(writer, progress, threads)
                checksums |= writer.checksums
                kinds = {dtype for name, (dtype, _) in self.layout.items() if self.base.tensors[name].floating}
                write_config(self.base.config, self.base.home, scratch, kinds.pop() if len(kinds) == 1 else None)
                copy_tokenizer(self.vocabulary.donor, scratch)
                self.vocabulary.finish(scratch)
        except OSError as error:
            place, why = error.filename or folder, error.strerror or error
            raise LewisError(f"{place}: cannot be written: {why}; free space, or write elsewhere") from error
        logger.info("merged %d tensors, %.2f GB, into %s", len(self.layout), self.size / 1e9, folder)

    def write_tensors(
        self,
        writer: CheckpointWriter,
        progress: Callable[[int, int, str], None] | None = None,
        threads: int | None = None,
    ) -> None:
        """Merge what a writer has to write, all of the layout or a part; arguments and errors as those of `run`."""
        done, threads = 0, threads or self.threads

        def report(name: str) -> None:
            nonlocal done
            done += self.base.tensors[name].elements
            if progress:
                progress(done, self.elements, name)

        names = [name for name in writer.names if name not in writer.finished]
        if writer.finished:
            logger.info("going on after %d tensors that are written already", len(writer.finished))
        for name in writer.finished:
            report(name)
        self._stopped.clear()
        pool = ThreadPoolExecutor(threads)
        try:
            following = iter([*names[threads:], *[None] * threads])
            for name, _ in zip(names, pool.map(lambda n: self._write(n, next(following), writer), names), strict=True):
                writer.finish(name)
                report(name)
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    @property
    def threads(self) -> int:
        """How many tensors are merged at a time, unless that is asked for: one per core."""
        return len(os.sched_getaffinity(0))

    def _write(self, name: str, later: str | None, writer: CheckpointWriter) -> None:
        """Merge and write one tensor; meanwhile the system may read the one whose turn is `later`."""
        from lewis.merge.compiled import (
            merge_tensor,  # it takes a moment to load, which those that only plan do not have
        )

        models: list[Model] = [self.base, *(expert.model for expert in self.experts)]
        if later is not None:
            for model in models[: 1 if later in self.excluded else None]:
                model.will_need(later)

        def write(data: memoryview, offset: int) -> None:
            if self._stopped.is_set():
                raise LewisError("the merge was stopped")
            writer.write_bytes(name, data, offset)

        with np.errstate(all="ignore"):  # what is not finite is told by name
            if not self._copy(name, write) and (self.device != "cpu" or not merge_tensor(self, name, write)):
                offset = 0
                for piece in in_torch.merge_by_rows(self, name):
                    write(bytes_of(piece), offset)
                    offset += piece.nbytes
        for model in models[: 1 if name in self.excluded else None]:
            model.done_with(name)

    def _copy(self, name: str, write: Callable[[memoryview, int], None]) -> bool:
        """Copy a tensor that is the base's own, if it is stored as it is to be."""
        if name not in self.excluded and self.base.tensors[name].floating:
            return False
        dtype, bits = self.base.raw(name)
        data = bits.view(np.uint8).data
        if dtype != self.layout[name][0]:  # a base with an adapter on it is read in fp32
            return False
        for start in range(0, len(data), _COPIED):
            write(data[start : start + _COPIED], start)
        return True

    def tensor(self, name: str) -> torch.Tensor:
        """Merge one tensor with the method's own function; returns and raises as `in_torch.merge_whole`."""
        return in_torch.merge_whole(self, name)

    def parameters(self, name: str) -> dict[str, Any]:
        """The method's parameters for one tensor: a list in the experts' order for each expert's own."""
        layer = layer_of(name)
        position = 0.0 if layer is None else layer / (self._layers - 1) if self._layers > 1 else 1.0
        values: dict[str, Any] = {}
        for parameter in self.method.parameters.values():
            if not parameter.per_expert:
                values[parameter.name] = self.recipe.value(parameter, None, name, position)
                continue
            values[parameter.name] = [self.recipe.value(parameter, e.entry, name, position) for e in self.experts]
            if parameter.name == "density":
                guided = [(e.densities or {}).get(name) for e in self.experts]
                values["density"] = [
                    own if guide is None else guide for own, guide in zip(values["density"], guided, strict=True)
                ]
        return values

    def active(self, name: str, values: Mapping[str, Any]) -> list[bool]:
        """Which experts have a say in a tensor, by the method's parameters for it."""
        elements = self.base.tensors[name].elements
        density = values.get("density", [1.0] * len(self.experts))
        # A random method may keep elements of a tensor that is too small for an exact share.
        kept = [d > 0 if self.method.random else int(d * elements) > 0 for d in density]
        return [k and w != 0 for k, w in zip(kept, values.get("weight", kept), strict=True)]

    def stream(self, expert: Expert, name: str) -> Stream:
        """The random stream of one expert's tensor."""
        return random_stream(self.recipe.seed, expert.model.key, name)

    def scales(self, name: str) -> list[torch.Tensor | None]:
        """What each expert's task vector of a tensor is multiplied with to be ranked; None for nothing."""
        return [(expert.scales or {}).get(name) for expert in self.experts]

    def _check_parameters(self) -> None:
        for name in self.base.tensors.keys() - self.excluded if self.method.check else ():
            values = self.parameters(name)
            for i, expert in enumerate(self.experts):
                each = {
                    p.name: values[p.name][i] if p.per_expert else values[p.name]
                    for p in self.method.parameters.values()
                }
                if self.method.check and (problem := self.method.check(each, len(self.experts))):
                    raise InputError(f"{name}: {expert.entry.model}: {problem}")

    def _check_scales(self) -> None:
        if any(expert.scales for expert in self.experts) and not self.method.takes_scales:
            raise InputError(f"lewis.prune_by: {self.method.name} does not trim by size; use magnitude")
        if self.held_back and not self.adds_to_base:
            raise InputError(f"lewis.aim: {self.method.name} merges no task vectors that could be held back")
        of_base = (str(self.recipe.base_model), self.held_back)
        for model, scales in (of_base, *((expert.entry.model, expert.scales or {}) for expert in self.experts)):
            for name, scale in scales.items():
                shape = self.base.tensors[name].shape if name in self.base.tensors else ()
                axes = zip(shape[len(shape) - scale.dim() :], scale.shape, strict=False)
                if len(shape) < scale.dim() or any(size not in (1, length) for length, size in axes):
                    raise InputError(
                        f"{model}: activations of shape {list(scale.shape)} do not fit {name!r}, "
                        f"{list(shape)}; measure the importance of this model again"
                    )

    def _digest(self) -> str:
        """Hash the parameters as resolved for each tensor: two recipes that give the same bytes get the same digest."""
        names = [name for name, info in self.base.tensors.items() if info.floating and name not in self.excluded]
        resolved = [[name, self.parameters(name)] for name in names]
        return store.digest(
            {
                "semantics": SEMANTICS,
                "method": self.method.name,
                "base": self.base.key,
                "experts": [expert.model.key for expert in self.experts],
                "parameters": resolved,
                "layout": [[name, dtype, list(shape)] for name, (dtype, shape) in self.layout.items()],
                "seed": self.recipe.seed if self.method.random else None,
                **({"device": torch.device(self.device).type} if self.device != "cpu" else {}),
                **({"excluded": sorted(self.excluded)} if self.excluded else {}),
                **({"plugin": self.method.origin} if self.method.origin else {}),
                **({"scales": scales} if any(scales := [_fingerprint(e.scales) for e in self.experts]) else {}),
                **({"held_back": held_back} if (held_back := _fingerprint(self.held_back)) else {}),
                **({"vocabulary": self.vocabulary.digest} if self.vocabulary.digest else {}),
                "tokenizer": {path.name: store.file_sha256(path) for path in tokenizer_files(self.vocabulary.donor)},
            }
        )


def _fingerprint(scales: Scales | None) -> str | None:
    """SHA-256 of the names, shapes and bytes of the scales; None if there are none."""
    if not scales:
        return None
    found = hashlib.sha256()
    for name in sorted(scales):
        found.update(f"{name}\0{list(scales[name].shape)}\0".encode() + scales[name].numpy().tobytes())
    return found.hexdigest()


def stored_dtype(recipe: Recipe) -> str | None:
    """The dtype that a recipe gives the result, as safetensors names it; None: each tensor keeps the base's."""
    return MERGED.get(recipe.out_dtype or recipe.dtype or "")


def random_stream(seed: int, expert: str, tensor: str) -> Stream:
    """The random stream of one (seed, expert, tensor), the same on every machine."""
    key = hashlib.sha256(f"{seed}\0{expert}\0{tensor}".encode()).digest()
    return Stream(int.from_bytes(key[:8], "little"))
