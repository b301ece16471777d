"""Run a merge: tensor by tensor into a checkpoint, several at a time, in compiled loops or in torch.

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.lazy_torch import torch
from lewis.merging.adapter import Adapter
from lewis.merging.calibration_rows import RIDGES
from lewis.merging.engine import in_torch
from lewis.merging.memory_budget import chunks
from lewis.merging.prepared import Prepared
from lewis.models.chat_template import write_template
from lewis.models.config import write_config
from lewis.models.dtypes import bytes_of, torch_dtype
from lewis.models.files.folder import ADAPTER, copy_processors, copy_tokenizer
from lewis.models.files.writer import CheckpointWriter
from lewis.progress import Report, silent
from lewis.settings import size_text
from lewis.store import manifest
from lewis.threads import cores

if TYPE_CHECKING:
    from lewis.merging.fitting.fitted import Fitted
    from lewis.merging.fitting.held_back import Fit

logger = logging.getLogger(__name__)
_FITTED = ".fitted"  # folder of the fitted tensors, in the folder of the output until that is complete


@dataclass(frozen=True)
class Written:
    """What a merge wrote: all that its model card and its references need, so that nothing is read again.

    Attributes:
        digest: identity of the merge.
        folder: of the checkpoint, or of the adapter.
        size: bytes of its weights.
        manifest: what `lewis.json` records, without the list of files.
        adapter: what the adapter holds and what error it leaves; None for a full checkpoint.
        fit: a sentence on the fit, as `text_of_fit` returns it.
    """

    digest: str
    folder: Path
    size: int
    manifest: Mapping[str, Any]
    adapter: Adapter | None = None
    fit: str = ""


def text_of_fit(manifest: Mapping[str, Any]) -> str:
    """Describe the choice of `ridge: auto` and the verdict of held-back rows on the fit; empty if there is neither."""
    if not manifest.get("ridge") and not manifest.get("held_back"):
        return ""
    from lewis.merging.fitting.held_back import Verdict  # brings torch with it
    from lewis.merging.fitting.ridge import Choice

    found: list[Choice | Verdict] = []
    found += [Choice.from_json(manifest["ridge"])] if manifest.get("ridge") else []
    found += [Verdict.from_json(manifest["held_back"])] if manifest.get("held_back") else []
    texts = [each.to_text() for each in found]
    if manifest.get("adapter"):
        texts.append("These numbers are of the fit itself, before it is reduced to the rank of the adapter")
    return ". ".join(texts)


class Merge(Prepared):
    """A prepared merge that can be run."""

    def run(
        self,
        folder: Path,
        *,
        max_shard_size: int = 5 * 10**9,
        manifest: Mapping[str, Any] | None = None,
        progress: Report = silent,
        threads: int | None = None,
        unchanged: Callable[[], None] = lambda: None,
    ) -> Written:
        """Write the merged checkpoint, or the adapter, to `folder`, which appears whole or not at all.

        If a process that wrote the same merge to `folder` died (kill -9, power), this one keeps the tensors that it had
        finished and writes the others. An adapter is started again from the beginning.

        Args:
            folder: the output; absent, empty, or an earlier output.
            max_shard_size: bytes.
            manifest: recorded in `lewis.json`, next to the digest.
            progress: called with (tensor name, elements done, elements in all); if the method fits, every element
                also counts once for each fit before the merge.
            threads: how many tensors are merged at a time; by default one per core.
            unchanged: called when all is written, and before statistics that a fit measures are kept; raises LewisError
                if a model has changed meanwhile.

        Raises:
            InputError: if there is no space, or `folder` is one of the models, or holds something else.
            LewisError: naming the tensor and model of a value that is not finite; or if the disk fails.
        """
        if folder.resolve() in {place.resolve() for model in self.models for place in (model.folder, model.home)}:
            raise InputError(f"{folder}: one of the models that are merged; choose another path")
        record: dict[str, Any] = {"digest": self.digest, **(manifest or {})}
        try:
            if self.as_adapter:
                return self._run_adapter(folder, record, progress, threads, unchanged)
            return self._run_full(folder, record, max_shard_size, progress, threads, unchanged)
        except OSError as error:
            place, why = error.filename or folder, error.strerror or error
            raise LewisError(f"{place}: cannot be written: {why}; free space, or write elsewhere") from error

    def _run_full(
        self,
        folder: Path,
        record: dict[str, Any],
        max_shard_size: int,
        progress: Report,
        threads: int | None,
        unchanged: Callable[[], None],
    ) -> Written:
        """`run` for a full checkpoint. Its checksums are remembered, so that the next reader need not hash it again."""
        known: dict[str, str] = {}
        with store.publish(folder, record, store.digest([self.digest, max_shard_size]), known) as scratch:
            store.check_space(folder, int(self.size * 1.01) + 10**7 - store.bytes_on_disk(scratch))
            check = partial(store.discard_unless, unchanged, scratch)
            with self._fitted_in(scratch / _FITTED, progress, threads, check) as (fitted, facts):
                record |= facts
                with CheckpointWriter(scratch, self.layout, max_shard_size) as writer:
                    self.write_tensors(writer, progress, threads, fitted)
            known |= writer.checksums
            kinds = {dtype for name, (dtype, _) in self.layout.items() if self.base.tensors[name].floating}
            write_config(self.base.config, self.base.home, scratch, kinds.pop() if len(kinds) == 1 else None)
            copy_processors(self.base.home, scratch)
            self._copy_tokenizer(scratch)
            self.vocabulary.finish(scratch)
            check()
        manifest.remember({folder / name: sha256 for name, sha256 in known.items()})
        logger.info("merged %d tensors, %s, into %s", len(self.layout), size_text(self.size), folder)
        return Written(self.digest, folder, self.size, record, fit=text_of_fit(record))

    def check_adapter(self) -> None:
        """Check that the merge changes no tensor that an adapter cannot hold.

        Raises:
            InputError: naming such a tensor.
        """
        from lewis.merging.lora_output import AdapterWriter

        AdapterWriter(self, lambda _: None).check(self._merged)

    def _run_adapter(
        self,
        folder: Path,
        record: dict[str, Any],
        progress: Report,
        threads: int | None,
        unchanged: Callable[[], None],
    ) -> Written:
        from lewis.merging.lora_output import AdapterWriter

        writer = AdapterWriter(self, self._counted(progress))
        store.check_space(folder, writer.size + 10**7)
        writer.check(self._merged)  # before a fit, which takes long
        known: dict[str, str] = {}
        with store.publish(folder, record, checksums=known) as scratch:
            check = partial(store.discard_unless, unchanged, scratch)
            with self._fitted_in(scratch / _FITTED, progress, threads, check) as (fitted, facts):
                merged = partial(self._merged, fitted=fitted)
                if fitted is not None:  # the fit may have changed tensors that the first check saw unchanged
                    writer.check(merged)
                adapter, known[ADAPTER] = writer.write(scratch, merged, threads)
            self._copy_tokenizer(scratch)
            size = (scratch / ADAPTER).stat().st_size
            record |= {**facts, "adapter": adapter.to_json()}
            check()
        logger.info("%s: %s", folder, adapter.to_text())
        return Written(self.digest, folder, size, record, adapter, text_of_fit(record))

    def _copy_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.vocabulary.donor, folder)
        if self.chat_template:
            write_template(folder, self.chat_template)

    @property
    def fit_count(self) -> int:
        """How many fits the merge makes: none, one, or with `ridge: auto` one more than there are ridges to try."""
        return 0 if not self.method.fits else 1 + len(RIDGES) * self.tunes

    @property
    def steps(self) -> int:
        """The number of elements that `progress` counts up to: all of the output, once for each fit and the merge."""
        return self.elements * (1 + self.fit_count)

    @contextmanager
    def _fitted_in(
        self, folder: Path, progress: Report, threads: int | None, unchanged: Callable[[], None]
    ) -> Iterator[tuple[Fitted | None, dict[str, Any]]]:
        """Fit the tensors that the method fits, before the others are merged; delete `folder` after the context.

        Yields:
            The fitted tensors, None if the method fits none; and for the manifest the chosen ridge and the verdict.
        """
        if not self.method.fits:
            yield None, {}
            return
        fit: Fit
        if self.method.fits == "static":
            from lewis.merging.fitting import static_fit

            fit = partial(static_fit.fit, unchanged=unchanged)
        else:
            from lewis.merging.fitting.fit import fit

        def part(before: int, times: int) -> Report:
            """Make the report of `times` fits that come after `before` others."""

            def report(_: str, done: int, total: int) -> None:
                progress("fit", int((before + times * (done / total)) * self.elements), self.steps)

            return report

        from lewis.merging.fitting.held_back import fit_and_judge, tightened

        merge = tightened(self)
        facts = dict[str, Any]()
        if self.tunes:
            from lewis.merging.fitting.ridge import choose, with_ridge

            choice = choose(merge, folder, fit, part(0, self.fit_count - 1), threads)
            merge, facts["ridge"] = with_ridge(merge, choice.ridge), choice.to_json()

        last = part(self.fit_count - 1, 1)
        if any(expert.held_back for expert in merge.judging):
            fitted, verdict = fit_and_judge(merge, folder, fit, last, threads)
            yield fitted, {**facts, "held_back": verdict.to_json()}
        else:
            yield fit(merge, folder, last, threads), facts
        store.discard(folder)

    def _counted(self, progress: Report) -> Callable[[str], None]:
        """Make a function that takes the name of each finished tensor and reports the elements done to `progress`."""
        done = self.steps - self.elements

        def report(name: str) -> None:
            nonlocal done
            done += self.base.tensors[name].elements
            progress(name, done, self.steps)

        return report

    def write_tensors(
        self,
        writer: CheckpointWriter,
        progress: Report = silent,
        threads: int | None = None,
        fitted: Fitted | None = None,
    ) -> None:
        """Merge the tensors that a writer has in its layout.

        Args:
            writer: takes the tensors.
            progress, threads: as those of `run`.
            fitted: what was fitted, if the method fits.

        Raises:
            LewisError: as `run`.
        """
        threads, report, stopped = threads or cores(), self._counted(progress), threading.Event()
        names = [name for name in writer.names if name not in writer.finished]
        if writer.finished:
            logger.info("going on after %d tensors that are written already", len(writer.finished))
        for name in writer.finished:
            report(name)

        def merge(name: str, later: str | None) -> None:
            self._write(name, later, writer, stopped, fitted)

        pool = ThreadPoolExecutor(threads)
        try:
            following = [*names[threads:], *[None] * threads]
            for name, _ in zip(names, pool.map(merge, names, following), strict=True):
                writer.finish(name)
                report(name)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def tensor(self, name: str) -> torch.Tensor:
        """Merge one tensor without a fit, in torch; raises as `in_torch.merge_by_rows`."""
        dtype, shape = self.layout[name]
        return in_torch.merge_into(self.maker_of(name), name, torch.empty(shape, dtype=torch_dtype(dtype)))

    def _write(
        self, name: str, later: str | None, writer: CheckpointWriter, stopped: threading.Event, fitted: Fitted | None
    ) -> None:
        """Merge and write one tensor; meanwhile the operating system may read `later`, which is merged next."""
        if later is not None:
            for model in self.models_with(later):
                model.will_need(later)

        def write(data: memoryview, offset: int) -> None:
            if stopped.is_set():
                raise LewisError("the merge was stopped")
            writer.write_bytes(name, data, offset)

        self._merge_into(name, write, fitted)
        for model in self.models_with(name):
            model.done_with(name)

    def _merged(self, name: str, fitted: Fitted | None = None) -> torch.Tensor:
        """Return one tensor as `run` writes it: fitted, copied, or merged in the same engine."""
        dtype, shape = self.layout[name]
        merged = torch.empty(shape, dtype=torch_dtype(dtype))
        target = bytes_of(merged)

        def write(data: memoryview, offset: int) -> None:
            target[offset : offset + data.nbytes] = data

        self._merge_into(name, write, fitted)
        return merged

    def _merge_into(self, name: str, write: Callable[[memoryview, int], None], fitted: Fitted | None) -> None:
        with np.errstate(all="ignore"):  # values that are not finite are reported by the tensor's name
            if fitted and name in fitted:
                write(bytes_of(fitted.read(name)), 0)
            elif not self._copy(name, write) and not self._in_compiled_loops(name, write):
                offset = 0
                for piece in in_torch.merge_by_rows(self.maker_of(name), name):
                    write(bytes_of(piece), offset)
                    offset += piece.nbytes

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
        from lewis.merging.engine.compiled import merge_tensor

        return merge_tensor(self.maker_of(name), name, write)
