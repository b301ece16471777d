"""Running a model that need not fit in memory: weights of a block are read when the passes reach it, then dropped."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from greenlet import greenlet
from torch import nn

from lewis.errors import InputError, LewisError
from lewis.importance.memory import room
from lewis.importance.passes import wait_at
from lewis.models.dtypes import as_tensor
from lewis.models.model import Model, read_as
from lewis.models.network.module_tree import Network

_RUN_NONE = (
    "use a merge_method that does not fit, and lewis.density.strategy uniform or depth_gradient, which run no model, "
    "or no lewis block"
)


class NotLoaded(LewisError):
    """A pass computed with a parameter that is not in memory.

    Attributes:
        parameter: its full name.
    """

    def __init__(self, parameter: str) -> None:
        super().__init__(f"{parameter}: used before it was loaded, since the model's code does not call its module")
        self.parameter = parameter


class _Empty(torch.Tensor):
    """A parameter without values, which raises `NotLoaded` in a computation: torch would take what lies in memory."""

    parameter: str
    _is_param = True  # to torch, it is a parameter

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ in _ASKING:
            return super().__torch_function__(func, types, args, kwargs or {})
        given = [*args, *(kwargs or {}).values()]
        flat = chain(given, *(each for each in given if isinstance(each, list | tuple)))
        raise NotLoaded(next(each.parameter for each in flat if isinstance(each, cls)))


# Functions that read no value.
_ASKING = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "element_size"}


class Weights:
    """The parameters of a network on the meta device: read from a model when they are needed, and dropped again."""

    def __init__(
        self,
        network: Network,
        model: Model,
        device: str,
        dtype: torch.dtype,
        keep: Callable[[torch.Tensor, torch.dtype | None], torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            network: on the meta device.
            model: the model that has the network's weights.
            device, dtype: of the parameters when they are loaded.
            keep: moves a value to where it is kept, in another dtype if one is given; by default to the device.
        """
        self.network, self.model, self._device, self._dtype = network, model, device, dtype
        self._keep = keep or (lambda value, dtype: value.to(device, dtype))

    def _check(self) -> None:
        """Raise InputError unless the model has every weight that the network needs."""
        needed = [name for path in self.network.blocks for name in self.network.parameters_in(path)]
        for name in filter(self.network.is_parameter, [*self.network.parameters_outside(), *needed]):
            if not any(map(self.network.sources, self.network.same(name))) and self.network.computed(name) is None:
                raise InputError(f"{self.model.folder}: transformers cannot load it: the weight {name!r} is missing")

    def load_outside(self, *, with_head: bool = False) -> None:
        """Read the parameters that are in no block, and move all buffers to the device.

        On a CPU, the embedding of a token is read when a pass needs it.

        Args:
            with_head: also those of the head that makes logits.

        Raises:
            InputError: if the model lacks a weight that the network needs, in a block or outside.
        """
        self._check()
        later = self.network.read_by_row(with_head=with_head) if self._device == "cpu" else []
        if later:
            self._fill_by_row(later)
        self.load(name for name in self.network.parameters_outside(with_head=with_head) if name not in later)
        for module in self.network.module.modules():  # tables of rotary embeddings, which no checkpoint holds
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def _fill_by_row(self, names: Sequence[str]) -> None:
        """Replace an embedding parameter, under all its names, by a table whose rows are filled as tokens come."""
        network = self.network
        tensor = next(tensor for tensor, name in network.unconverted.items() if name in names)
        (kind, bits), shape = self.model.raw(tensor), self.model.shapes[tensor]
        rows, table, done_with = bits.reshape(shape), _empty_table(shape, self._dtype), self.model.done_with

        def fill(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            ids = next(iter((*given, *named.values()))).unique()
            values = rows[ids.numpy()]
            table[ids] = as_tensor(kind, values.reshape(-1)).reshape(values.shape).to(table.dtype)
            done_with(tensor)

        for name in names:
            _put(network.module, name, table)
            module = network.module.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.Embedding):  # the others are heads, whose logits are not used
                module.register_forward_pre_hook(fill, with_kwargs=True)

    def load(self, names: Iterable[str]) -> None:
        """Read these parameters and saved buffers, by their full names."""
        network, done = self.network, set[str]()
        for name in names:
            same = network.same(name)
            source = next(filter(network.sources, same), None)
            if name in done:
                continue
            value = network.computed(name) if source is None else self._value(source)
            if value is None:
                continue
            value = self._keep(value, self._dtype if network.is_parameter(name) else None)
            for each in same:
                _put(network.module, each, value)
            done.update(same)

    def _value(self, name: str) -> torch.Tensor:
        network, tensors = self.network, self.network.sources(name)
        plain = tensors[0] in network.unconverted and network.is_parameter(name) and self._device == "cpu"
        value = network.value(name, partial(read_as, self.model, dtype=self._dtype) if plain else self.model.read)
        for tensor in tensors:
            self.model.done_with(tensor)
        return value

    def drop(self, names: Iterable[str]) -> None:
        """Drop the values of these parameters: they are on the meta device again, and a pass cannot use them."""
        for name in filter(self.network.is_parameter, names):
            path, _, leaf = name.rpartition(".")
            empty = self.network.empty(name).detach().as_subclass(_Empty)
            empty.parameter = name
            setattr(self.network.module.get_submodule(path), leaf, empty)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Give one parameter a value that is not the model's own."""
        _put(self.network.module, name, self._keep(value, self._dtype))


class Streamed:
    """A context in which a network can run; at any time, memory holds one block's weights, and those outside of blocks.

    Where all weights fit on a GPU, they are kept there instead.
    """

    def __init__(self, network: Network, model: Model, device: str, dtype: torch.dtype, *, keep: bool = True) -> None:
        """
        Args:
            network: on the meta device.
            model: the model that has the network's weights.
            device, dtype: where and in what the passes compute.
            keep: whether the weights may stay in a GPU's memory.
        """
        self._network, self._model, self._device, self._dtype = network, model, device, dtype
        self.weights = Weights(network, model, device, dtype)
        self._hooks = ExitStack()
        self._runs: list[greenlet] = []
        self._keep = keep and device != "cpu" and self._fits()

    def __enter__(self) -> "Streamed":
        network = self._network
        self.weights.load_outside()
        for path, block in network.blocks.items():
            if self._keep:
                self.weights.load(network.parameters_in(path))
            else:
                self._hooks.callback(block.register_forward_pre_hook(partial(wait_at, path)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:  # after an error: end the passes that still wait, in the thread that began them
            run.throw()
        self._hooks.close()

    @property
    def room(self) -> int:
        """Bytes of hidden states that may wait, as `memory.room`; 0 if it saves nothing, as the weights stay."""
        return 0 if self._keep else room(self._network, self._dtype)

    def lock_step(self, forwards: Sequence[Callable[[], None]], turn: Callable[[int], None]) -> Iterator[float]:
        """Run forward passes side by side: all go through a block, one after another, before any enters the next one.

        Each pass is a greenlet, a coroutine that can stop at any depth of calls: here at the entry of a block, inside
        the code of any model. All run in this thread, and share its settings, its memory and OpenMP's pool.

        Args:
            forwards: each runs the network once.
            turn: called with the index of a pass right before it is resumed.

        Yields:
            After each block, the share of the blocks that all have passed.
        """
        runs = self._runs = [greenlet(forward) for forward in forwards]
        places, passed = [], 0  # the block that each waits at; None at its end
        for i, run in enumerate(runs):
            turn(i)
            places.append(run.switch())
        while path := next(filter(None, places), None):
            names = self._network.parameters_in(path)
            self.weights.load(names)
            for i, run in enumerate(runs):
                if places[i] == path:
                    turn(i)
                    places[i] = run.switch()
            self.weights.drop(names)
            passed += 1
            yield min(1.0, passed / len(self._network.blocks))

    def _fits(self) -> bool:
        needed = sum(info.elements for info in self._model.tensors.values()) * self._dtype.itemsize
        free, _ = torch.cuda.mem_get_info(self._device)
        return needed * 5 // 4 < free


def _empty_table(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that takes memory only for the pages that are written."""
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel without huge pages, or another system
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # else one row takes 2 MB
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def _put(network: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    buffer = any(name == leaf for name, _ in module.named_buffers(recurse=False))
    setattr(module, leaf, value if buffer else nn.Parameter(value, requires_grad=False))


def forward(network: Network, ids: torch.Tensor, lengths: list[int]) -> None:
    """Send one batch through all blocks, without the head.

    A model that never looks ahead needs no mask for padding on the right.

    Args:
        network: whose parameters are read when they are needed.
        ids: token ids, int64 (samples, width).
        lengths: of the samples, without padding.

    Raises:
        InputError: if the model does not run on text alone.
    """
    module = network.module
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long().to(ids.device)
    with blaming_the_model(network, _RUN_NONE):
        if not network.encodes:
            masked = {"attention_mask": mask} if network.looks_ahead and min(lengths) < ids.shape[1] else {}
            network.tower(input_ids=ids, use_cache=False, **masked)
            return
        encoded = module.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        module.get_decoder()(  # with the same text, shifted by a token
            input_ids=decoder_ids(module.config, ids),
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        )


@contextmanager
def blaming_the_model(network: Network, fix: str) -> Iterator[None]:
    """A context in which an exception of the model's own code is raised as an InputError: it needs more than text.

    Args:
        network: whose modules run.
        fix: what to do, for the message.
    """
    try:
        yield
    except LewisError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # raised by the model's own code
        # The text may hold the repr of a module, with a line for each layer: the first and the last line say enough.
        first, *others = str(error).splitlines() or [""]
        reason = f"{first.rstrip(' (')} {others[-1].lstrip(') ')}" if others else first
        reason = " ".join(reason.split())[:200]
        raise InputError(
            f"{network.folder}: {type(network.module).__name__} does not run on text alone ({type(error).__name__}: "
            f"{reason}); {fix}"
        ) from error


def decoder_ids(config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Shift token ids by one place, after the start token: the input from which a decoder predicts these tokens."""
    return torch.cat([torch.full_like(ids[:, :1], _decoder_start(config)), ids[:, :-1]], dim=1)


def _decoder_start(config: Any) -> int:
    """The token that a decoder begins with: as the config says (T5), or the decoder's bos token (T5Gemma), or 0."""
    decoder = config.get_text_config(decoder=True)
    named = (getattr(config, "decoder_start_token_id", None), getattr(decoder, "bos_token_id", None))
    return next((token for token in named if token is not None), 0)
