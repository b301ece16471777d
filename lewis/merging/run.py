"""Do a merge: tensor by tensor into a checkpoint, several at a time, in compiled loops or in torch.

Arithmetic is fp32 whatever the stored dtype, and the result is rounded once. Where the merged delta of an element is
exactly one expert's task vector, the result is that expert's own weight, and where it is 0, the base's: so one expert
at density 1 and weight 1 comes out byte by byte, and density 0 gives the base.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.lazy_torch import torch
from lewis.merging import in_torch
from lewis.merging.chunks import chunks
from lewis.merging.prepared import Prepared
from lewis.merging.settings import RIDGES
from lewis.models.chat_template import write_template
from lewis.models.config import write_config
from lewis.models.dtypes import bytes_of, torch_dtype
from lewis.models.files.folder import copy_tokenizer
from lewis.models.files.writer import CheckpointWriter
from lewis.models.model import Model

if TYPE_CHECKING:
    from lewis.merging.fitted import Fitted

logger = logging.getLogger(__name__)
_FITTED = ".fitted"  # folder of what is fitted, in that of the output until it is whole


class Merge(Prepared):
    """A prepared merge that can be run; made as a `Prepared` is."""

    _fitted: Fitted | None = None

    def run(
        self,
        folder: Path,
        *,
        max_shard_size: int = 5 * 10**9,
        manifest: Mapping[str, Any] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        threads: int | None = None,
    ) -> None:
        """Write the merged checkpoint, or the adapter, to `folder`, which appears whole or not at all.

        If a process that wrote the same merge to `folder` died (kill -9, power), this one keeps the tensors that it had
        finished and writes the others. An adapter is begun anew.

        Args:
            folder: the output; absent, empty, or an earlier output.
            max_shard_size: bytes.
            manifest: recorded in `lewis.json`, beside the digest.
            progress: called with (elements done, elements in all, tensor name); if the method fits, every element
                counts first as one to be fitted, as often as it is.
            threads: how many tensors are merged at a time; by default one per core.

        Raises:
            InputError: if there is no space, or `folder` is one of the models, or holds something else.
            LewisError: naming the tensor and model of a value that is not finite; or if the disk fails.
        """
        if folder.resolve() in {place.resolve() for model in self.models for place in (model.folder, model.home)}:
            raise InputError(f"{folder}: one of the models that are merged; choose another path")
        if self.as_adapter:
            self._run_adapter(folder, manifest, progress, threads)
            return
        checksums: dict[str, str] = {}
        record: dict[str, Any] = {"digest": self.digest, **(manifest or {})}
        key = store.digest([self.digest, max_shard_size])
        try:
            with store.publish(folder, record, key, checksums) as scratch:
                store.check_space(folder, int(self.size * 1.01) + 10**7 - store.bytes_on_disk(scratch))
                with (
                    self._fitted_in(scratch / _FITTED, record, progress, threads),
                    CheckpointWriter(scratch, self.layout, max_shard_size) as writer,
                ):
                    self.write_tensors(writer, progress, threads)
                checksums |= writer.checksums
                kinds = {dtype for name, (dtype, _) in self.layout.items() if self.base.tensors[name].floating}
                write_config(self.base.config, self.base.home, scratch, kinds.pop() if len(kinds) == 1 else None)
                self._copy_tokenizer(scratch)
                self.vocabulary.finish(scratch)
        except OSError as error:
            place, why = error.filename or folder, error.strerror or error
            raise LewisError(f"{place}: cannot be written: {why}; free space, or write elsewhere") from error
        logger.info("merged %d tensors, %.2f GB, into %s", len(self.layout), self.size / 1e9, folder)

    def check_adapter(self) -> None:
        """Check that the merge changes no tensor that an adapter cannot hold.

        Raises:
            InputError: naming such a tensor.
        """
        from lewis.merging.lora_output import AdapterWriter

        AdapterWriter(self, self._merged, lambda _: None).check()

    def _run_adapter(
        self,
        folder: Path,
        manifest: Mapping[str, Any] | None,
        progress: Callable[[int, int, str], None] | None,
        threads: int | None,
    ) -> None:
        """`run` for an adapter. The manifest's `adapter` tells the ranks and the error (`lewis.merging.adapter`)."""
        from lewis.merging.lora_output import AdapterWriter

        done = self.steps - self.elements

        def report(name: str) -> None:
            nonlocal done
            done += self.base.tensors[name].elements
            if progress:
                progress(done, self.steps, name)

        record: dict[str, Any] = {"digest": self.digest, **(manifest or {})}
        writer = AdapterWriter(self, self._merged, report)
        store.check_space(folder, writer.size + 10**7)
        writer.check()  # before a fit, which takes long
        try:
            with (
                store.publish(folder, record) as scratch,
                self._fitted_in(scratch / _FITTED, record, progress, threads),
            ):
                adapter = writer.write(scratch, threads)
                self._copy_tokenizer(scratch)
                record["adapter"] = adapter.to_json()
        except OSError as error:
            place, why = error.filename or folder, error.strerror or error
            raise LewisError(f"{place}: cannot be written: {why}; free space, or write elsewhere") from error
        logger.info("%s: %s", folder, adapter.to_text())

    def _copy_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.vocabulary.donor, folder)
        if self.chat_template:
            write_template(folder, self.chat_template)

    @property
    def fits(self) -> int:
        """How many times the projections are fitted: with `ridge: auto`, once more than there are ridges to try."""
        return 0 if not self.method.fits else 1 + len(RIDGES) * self.tunes

    @property
    def steps(self) -> int:
        """What `progress` counts up to."""
        return self.elements * (1 + self.fits)

    @contextmanager
    def _fitted_in(
        self,
        folder: Path,
        record: dict[str, Any],
        progress: Callable[[int, int, str], None] | None,
        threads: int | None,
    ) -> Iterator[None]:
        """Fit what the method fits, before the other tensors are merged; what is in `folder` is gone afterwards.

        What `ridge: auto` chose goes into the record.
        """
        if self.method.fits:
            if self.method.fits == "static":
                from lewis.merging.static_fit import fit
            else:
                from lewis.merging.fit import fit

            def report(fits: float) -> None:
                if progress:
                    progress(int(fits * self.elements), self.steps, "fit")

            merge: Prepared = self
            if self.tunes:
                from lewis.merging.ridge import choose, with_ridge

                choice = choose(self, folder, fit, lambda share: report(share * (self.fits - 1)), threads)
                record["ridge"] = choice.to_json()
                merge = with_ridge(self, choice.ridge)
            self._fitted = fit(merge, folder, lambda share: report(self.fits - 1 + share), threads)
        yield
        self._fitted = None
        store.discard(folder)

    def write_tensors(
        self,
        writer: CheckpointWriter,
        progress: Callable[[int, int, str], None] | None = None,
        threads: int | None = None,
    ) -> None:
        """Merge the tensors that a writer has in its layout; the other arguments, and errors, as those of `run`."""
        done, threads = 0, threads or self.threads

        def report(name: str) -> None:
            nonlocal done
            done += self.base.tensors[name].elements
            if progress:
                progress(self.steps - self.elements + done, self.steps, name)

        names = [name for name in writer.names if name not in writer.finished]
        if writer.finished:
            logger.info("going on after %d tensors that are written already", len(writer.finished))
        for name in writer.finished:
            report(name)
        self._stopped = threading.Event()
        pool = ThreadPoolExecutor(threads)
        try:
            following = iter([*names[threads:], *[None] * threads])
            for name, _ in zip(names, pool.map(lambda n: self._write(n, next(following), writer), names), strict=True):
                writer.finish(name)
                report(name)
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    def tensor(self, name: str) -> torch.Tensor:
        """Merge one tensor without a fit, in torch; returns and raises as `in_torch.merge_whole`."""
        return in_torch.merge_whole(self.giving(name), name)

    def _write(self, name: str, later: str | None, writer: CheckpointWriter) -> None:
        """Merge and write one tensor; meanwhile the operating system may read `later`, which is merged next."""
        if later is not None:
            for model in self._read_for(later):
                model.will_need(later)

        def write(data: memoryview, offset: int) -> None:
            if self._stopped.is_set():
                raise LewisError("the merge was stopped")
            writer.write_bytes(name, data, offset)

        self._merge_into(name, write)
        for model in self._read_for(name):
            model.done_with(name)

    def _merged(self, name: str) -> torch.Tensor:
        """One tensor as `run` writes it: fitted, copied, or merged in the engine that it uses."""
        dtype, shape = self.layout[name]
        merged = torch.empty(shape, dtype=torch_dtype(dtype))
        target = bytes_of(merged)

        def write(data: memoryview, offset: int) -> None:
            target[offset : offset + data.nbytes] = data

        self._merge_into(name, write)
        return merged

    def _merge_into(self, name: str, write: Callable[[memoryview, int], None]) -> None:
        with np.errstate(all="ignore"):  # values that are not finite are reported by the tensor's name
            if self._fitted and name in self._fitted:
                write(bytes_of(self._fitted.read(name)), 0)
            elif not self._copy(name, write) and not self._in_compiled_loops(name, write):
                offset = 0
                for piece in in_torch.merge_by_rows(self.giving(name), name):
                    write(bytes_of(piece), offset)
                    offset += piece.nbytes

    def _read_for(self, name: str) -> list[Model]:
        return self.models[: 1 if name in self.excluded else None]

    def _copy(self, name: str, write: Callable[[memoryview, int], None]) -> bool:
        """Copy a tensor of the base that is not merged; False if it is merged, or stored in another dtype."""
        if self.merges(name):
            return False
        dtype, bits = self.base.raw(name)
        if dtype != self.layout[name][0]:  # a base with an adapter on it is read in fp32
            return False
        for start, stop in chunks(bits.size):
            write(bits[start:stop].view(np.uint8).data, start * bits.itemsize)
        return True

    def _in_compiled_loops(self, name: str, write: Callable[[memoryview, int], None]) -> bool:
        """Merge a tensor as `compiled.merge_tensor`; False if it has to be merged in torch."""
        if self.device != "cpu":
            return False
        # Imported here to start quickly: numba and the compiled code take about a second to load, which only a merge
        # that is run has to wait for. Checks, digests and `lewis --help` do without.
        from lewis.merging.compiled import merge_tensor

        return merge_tensor(self.giving(name), name, write)
