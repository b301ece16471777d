"""Keep a model's answers in a file, batch by batch, so that an evaluation that was killed continues where it stopped.

lm-eval's own cache of answers is not used. It is a database of pickles. It does not know the batches, so a run that
continues has other batches, and its numbers differ in the last digit. It has rolling log-likelihoods only when all are
done. Here each line is one batch, as JSON with a checksum. A batch is in the file whole or not at all, so the remaining
requests are cut into the same batches as without the kill, and the scores are the same bytes. With `batch_size: auto`
lm-eval chooses the batches itself, by the memory that is free.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lewis import private_names
from lewis.store import sealed_json


class KeptAnswers:
    """The answers of one model to the requests of one task.

    Of equal requests, the n-th gets the n-th answer. Answers that are drawn at random are not kept.
    """

    def __init__(self, path: Path) -> None:
        """Read the answers that earlier processes have kept, without damaged lines: a kill may cut the last one short.

        Args:
            path: of the file, in a folder that exists. It belongs to one model, task, number format and batch size.
        """
        self._path = path
        self._kept: dict[str, deque[Any]] = defaultdict(deque)
        self._batch = list[tuple[str, Any]]()  # (key, answer) of the batch that is being computed
        self._asked: str | None = None  # method and generation settings of the current call
        data = path.read_bytes() if path.exists() else b""
        if data and not data.endswith(b"\n"):
            self._write(b"\n")
        for line in data.splitlines():
            try:
                answers = sealed_json.unsealed(json.loads(line))["answers"]
            except (ValueError, TypeError, KeyError):
                continue
            for key, answer in answers:
                self._kept[key].append(answer)

    @contextmanager
    def used_by(self, lm: Any) -> Iterator[None]:
        """A context in which lm-eval's model answers from the file, and writes into it what it has to compute."""
        hook = lm.cache_hook
        with ExitStack() as replaced:
            lm.set_cache_hook(self)
            replaced.callback(lm.set_cache_hook, hook)
            for name in ("loglikelihood", "generate_until"):
                replaced.enter_context(_replaced(lm, name, self._answering(name, getattr(lm, name))))
            rolling = self._rolling(lm, lm.loglikelihood_rolling)
            replaced.enter_context(_replaced(lm, "loglikelihood_rolling", rolling))
            replaced.enter_context(self._ends_of_batches(lm))
            yield

    def once(self, name: str, of: Any, compute: Callable[[], Any]) -> Any:
        """Call `compute` unless its result for this name and input is kept, from this process or an earlier one."""
        key = self._key(name, of)
        if self._kept[key]:
            return self._kept[key].popleft()
        found = compute()
        self._batch.append((key, found))
        self._flush()
        return found

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Add one answer to the current batch: lm-eval calls this as it calls its own `CacheHook`."""
        if self._asked is not None and attr != "loglikelihood_rolling" and res is not None:
            self._batch.append((self._key(self._asked, _asked_of(attr, req)), res))

    def _answering(self, name: str, method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """Wrap a model's `loglikelihood` or `generate_until`, so that it computes only answers that are not kept."""

        def answer(requests: Sequence[Any], **options: Any) -> list[Any]:
            groups = defaultdict[str, list[int]](list)
            for place, request in enumerate(requests):
                settings = request.args[1] if name == "generate_until" else {}
                if len(request.args) > 2 or settings.get("do_sample") or settings.get("temperature"):
                    return method(requests, **options)
                groups[json.dumps([name, settings], sort_keys=True, default=str)].append(place)
            answers: list[Any] = [None] * len(requests)
            for asked, places in groups.items():  # backends never put several settings into one batch
                missing = []
                for place in places:
                    kept = self._kept[self._key(asked, _asked_of(name, requests[place].args))]
                    if kept:
                        first = kept.popleft()
                        answers[place] = tuple(first) if isinstance(first, list) else first
                    else:
                        missing.append(place)
                if missing:
                    self._asked = asked
                    found = method([requests[place] for place in missing], **options)
                    self._flush()
                    self._asked = None
                    for place, each in zip(missing, found, strict=True):
                        answers[place] = each
            return answers

        return answer

    def _rolling(self, lm: Any, method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """Wrap a model's `loglikelihood_rolling`, which cuts texts into windows, to keep each batch of windows."""
        name, compute = private_names.LM_EVAL_TOKENS.name.rpartition(".")[2], private_names.LM_EVAL_TOKENS.of(lm)

        def windows(requests: Sequence[Any], *arguments: Any, **options: Any) -> list[Any]:
            key = self._key("windows", [each[1:] for each in requests])
            if self._kept[key]:
                return [tuple(each) for each in self._kept[key].popleft()]
            found = compute(requests, *arguments, **options)
            self._batch.append((key, found))
            self._flush()
            return list(found)

        def answer(requests: Sequence[Any], **options: Any) -> list[Any]:
            with _replaced(lm, name, windows):
                return method(requests, **options)

        return answer

    @contextmanager
    def _ends_of_batches(self, lm: Any) -> Iterator[None]:
        """A context in which each batch is written once the model is asked for the next one."""
        with ExitStack() as replaced:
            model: Any = getattr(lm, "model", None)
            if hasattr(model, "get_input_embeddings"):  # transformers calls it at the start of each forward pass
                handle = model.get_input_embeddings().register_forward_pre_hook(lambda *_: self._flush())
                replaced.callback(handle.remove)
            elif hasattr(model, "generate"):  # vLLM and SGLang
                replaced.enter_context(_replaced(model, "generate", self._first_flushed(model.generate)))
            if hasattr(lm, "model_call"):  # a server
                replaced.enter_context(_replaced(lm, "model_call", self._first_flushed(lm.model_call)))
                ask = lm.amodel_call

                async def ask_and_flush(*arguments: Any, **options: Any) -> Any:
                    found = await ask(*arguments, **options)  # it adds all answers of a batch without a pause
                    self._flush()
                    return found

                replaced.enter_context(_replaced(lm, "amodel_call", ask_and_flush))
            yield

    def _first_flushed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._flush()
            return function(*arguments, **options)

        return call

    def _flush(self) -> None:
        if self._batch:
            line = json.dumps(sealed_json.sealed({"answers": self._batch}))
            self._batch = []
            self._write(f"{line}\n".encode())

    def _write(self, data: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            file.write(data)

    @staticmethod
    def _key(asked: str, of: Any) -> str:
        return hashlib.sha256(json.dumps([asked, of]).encode()).hexdigest()[:32]


def _asked_of(name: str, args: Iterable[Any]) -> list[Any]:
    """The arguments that distinguish requests of one method with the same settings."""
    return list(args)[: 1 if name == "generate_until" else 2]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an attribute of an object, its own or its class's, has this value."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
