"""Sums of x_j^2 over the tokens that go into each projection, collected while a model runs.

Hooks see the inputs of `nn.Linear` and `Conv1D`. Experts that are stacked in one parameter have no module to hook:
there the multiplication with a slice of the parameter is seen by a `TorchFunctionMode`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lewis.errors import LewisError
from lewis.models.names import feeds_other_tokens
from lewis.models.network.module_tree import Network

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "addmm"}


class HiddenPaddingError(LewisError):
    """A projection sees another number of tokens than the batch has, and which of them are padding is unknown."""


class SecondMoments:
    """Running sums of x_j^2 on each calibration set; to be used as a context around the forward passes.

    Attributes:
        sums: of the selected set, parameter -> sum of x_j^2, fp64, (in,) or, of stacked experts, (experts, in).
        counts: of the selected set, parameter -> number of tokens, () or (experts,).
        lengths, width, weights: of the current batch, as `batches.Batch` has them.
    """

    def __init__(self, network: Network, device: str, sets: int) -> None:
        self._network, self._device = network, device
        self._sets: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = [({}, {}) for _ in range(sets)]
        self.sums, self.counts = self._sets[0]
        self.lengths: list[int] = []
        self.width = 0
        self.weights: torch.Tensor | None = None
        self._mask = torch.ones(1, 1, device=device)
        self._padded = False
        # The last input, which q, k and v share; and by whether tokens are weighted: sum of squares, number of tokens.
        self._last: tuple[torch.Tensor | None, dict[bool, tuple[torch.Tensor, float]]] = (None, {})
        self._stacks: dict[int, str] = {}  # address of a stacked parameter's memory -> its name
        self._real_rows: dict[tuple[str, int], torch.Tensor] = {}  # rows of an expert's tokens that are no padding
        self._hooks = ExitStack()
        self._paused = False

    def __enter__(self) -> "SecondMoments":
        stacked: dict[nn.Module, list[str]] = {}
        self._flat = {covered.parameter: covered.stack for covered in self._network.covered if covered.stack}
        for parameter in dict.fromkeys(covered.parameter for covered in self._network.covered):
            path, _, name = parameter.rpartition(".")
            module = self._network.module.get_submodule(path)
            weight = getattr(module, name)
            if weight.dim() == 3 or parameter in self._flat:
                stacked.setdefault(module, []).append(parameter)
            else:  # blocks may share a weight (Zamba): the inputs in each of them count
                paths = [each.rpartition(".")[0] for each in self._network.same(parameter)]
                for shared in dict.fromkeys(map(self._network.module.get_submodule, paths)):
                    hook = shared.register_forward_pre_hook(self._of_module(parameter))
                    self._hooks.callback(hook.remove)
        for module, parameters in stacked.items():
            mode = SeeProducts(self.of_product)
            for hook in (
                module.register_forward_pre_hook(self._before_experts(parameters, mode), with_kwargs=True),
                module.register_forward_hook(lambda *_, mode=mode: mode.__exit__(None, None, None), always_call=True),
            ):
                self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def select(self, of: int) -> None:
        """Select the calibration set that the next batches belong to, by its index."""
        self.sums, self.counts = self._sets[of]

    def begin(self, lengths: Sequence[int], width: int, weights: torch.Tensor | None = None) -> None:
        """Announce the next batch: rows of these lengths, padded on the right to `width`.

        Args:
            lengths: tokens of each row.
            width: of the batch.
            weights: how much each token counts, fp32 (rows, width), 0 where it is padding; None: all alike.
        """
        self.lengths, self.width, self.weights = list(lengths), width, weights
        places = torch.arange(width, device=self._device)
        self._mask = (places < torch.tensor(lengths, device=self._device)[:, None]).float()
        self._padded = min(lengths) < width
        self._last = (None, {})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which no inputs are added to the sums."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def means(self, parameter: str, of: int = 0) -> torch.Tensor | None:
        """Mean of x_j^2 of a parameter in set `of`: (in,), or (experts, in) with NaN for experts that no token reached.

        None if no token reached the parameter; Inf where an activation was NaN or Inf.
        """
        all_sums, all_counts = self._sets[of]
        counts = all_counts.get(parameter)
        if counts is None or not bool(counts.any()):
            return None
        sums = all_sums[parameter].nan_to_num(nan=torch.inf, posinf=torch.inf)
        return torch.where(counts[..., None] > 0, sums / counts[..., None], torch.nan).cpu()

    def _of_module(self, parameter: str) -> Any:
        def collect(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self._paused or not inputs or inputs[0] is None:  # a call without tensors (Voxtral's audio)
                return
            if inputs[0] is not self._last[0]:  # q, k and v see the same tensor: square it once
                self._last = (inputs[0], {})
            weighted = self.weights is not None and not feeds_other_tokens(parameter.removesuffix(".weight"))
            if weighted not in self._last[1]:
                self._last[1][weighted] = self._squares(parameter, inputs[0], weighted)
            squares, tokens = self._last[1][weighted]
            if parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(squares)
                self.counts[parameter] = torch.zeros((), dtype=torch.float64, device=self._device)
            self.sums[parameter] = self.sums[parameter] + squares
            self.counts[parameter] += tokens

        return collect

    def _squares(self, parameter: str, inputs: torch.Tensor, weighted: bool) -> tuple[torch.Tensor, float]:
        rows, width = self._mask.shape
        tokens = int(inputs.shape[:-1].numel())
        turned = self._padded and rows != width and inputs.shape[:2] == (width, rows)  # XLNet: (tokens, samples)
        if tokens == rows * width and not turned:
            # A product with the mask sums over the tokens and leaves padding out.
            squares = inputs.reshape(rows, width, -1).float().square()
            mask = self.weights.to(self._device) if weighted and self.weights is not None else self._mask
            summed = torch.bmm(mask[:, None], squares)[:, 0].sum(dim=0, dtype=torch.float64)
            return summed, float(mask.sum(dtype=torch.float64))
        if self._padded:
            raise HiddenPaddingError(
                f"{parameter}: gets {tokens} of {rows * width} tokens, and which of them are padding is unknown; "
                "this way of routing tokens to experts is not supported"
            )
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        return flat.square().sum(dim=0, dtype=torch.float64), tokens

    def _before_experts(self, parameters: list[str], mode: "SeeProducts") -> Any:
        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            self._stacks, self._real_rows = {}, {}
            for name in parameters:
                stack = getattr(module, name.rpartition(".")[2])
                self._stacks[stack.untyped_storage().data_ptr()] = name
                if name not in self.counts:
                    self.counts[name] = torch.zeros(
                        self._flat.get(name, stack.shape[0]), dtype=torch.float64, device=self._device
                    )
            mode.__enter__()
            first, mask = next(iter(named), ""), self._mask  # of a mixer (Zamba), hidden states may be given by name
            hidden = inputs[0] if inputs else named.get(first)
            if self._padded and isinstance(hidden, torch.Tensor) and hidden.shape[:-1].numel() == mask.numel():
                # Padding is routed too. As rows of zeros it can be distinguished from tokens.
                hidden = hidden * mask.reshape(*hidden.shape[:-1], 1).to(hidden.dtype)
            return ((hidden, *inputs[1:]), named) if inputs else ((), {**named, **({first: hidden} if first else {})})

        return before

    def of_product(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the inputs of one expert, if `weight` is a slice of a stacked parameter."""
        name = self._stacks.get(weight.untyped_storage().data_ptr())
        if name is None or inputs.dim() != 2:
            return
        stack = self.counts[name]
        expert = weight.storage_offset() // (weight.shape[0] * weight.shape[1])
        key = (name.rpartition(".")[0], expert)
        if not self._padded:
            self._real_rows[key] = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        elif key not in self._real_rows:
            self._real_rows[key] = inputs.ne(0).any(dim=1)
        rows = self._real_rows[key].double()
        squares = rows @ inputs.double().square()
        if name not in self.sums:
            self.sums[name] = torch.zeros(len(stack), inputs.shape[1], dtype=torch.float64, device=self._device)
        self.sums[name][expert] += squares
        self.counts[name][expert] += rows.sum()


class SeeProducts(TorchFunctionMode):
    """Calls a function with (inputs, weight) before each matrix product.

    A batched product is seen as one product for each matrix of the batch. There rows of zeros are left out: experts
    that are all run in one product (Llama 4) get zeros in place of tokens that are not routed to them.
    """

    def __init__(self, see: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _PRODUCTS:
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            if function.__name__ == "addmm":
                tensors = tensors[1:]
            if len(tensors) >= 2:
                self._see(tensors[0], tensors[1])
        elif getattr(function, "__name__", "") in ("bmm", "baddbmm"):
            inputs, weights = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            for rows, weight in zip(inputs, weights, strict=True):
                self._see(rows[rows.ne(0).any(dim=1)], weight)
        return function(*args, **(kwargs or {}))
