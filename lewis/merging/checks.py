"""Checks of a merge before it is run: parameters, scales, calibration rows, and whether an adapter can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lewis.allocation.densities import ScalesByTensor
from lewis.errors import InputError
from lewis.merging.calibration_rows import check_split
from lewis.merging.settings import Expert, MergeSettings
from lewis.methods import Method
from lewis.methods.registry import AUTO
from lewis.models.files.folder import is_of_gguf
from lewis.models.lora.expert import LoraExpert
from lewis.models.model import Model


def check_parameters(
    method: Method, names: Iterable[str], experts: Sequence[Expert], parameters: Callable[[str], dict[str, Any]]
) -> None:
    """Check the parameters of every tensor with the method's own `check`, if it has one.

    Args:
        method: the merge method.
        names: names of the tensors that are merged.
        experts: the experts that are merged.
        parameters: returns the parameters of one tensor; for a parameter per expert, a list.

    Raises:
        InputError: naming the tensor and the expert.
    """
    if method.check is None:
        return
    for name in names:
        values = parameters(name)
        for i, expert in enumerate(experts):
            each = {p.name: values[p.name][i] if p.per_expert else values[p.name] for p in method.parameters.values()}
            with method.blamed(name):
                problem = method.check(each, len(experts))
            if problem:
                raise InputError(f"{name}: {expert.ref}: {problem}")


def check_scales(
    settings: MergeSettings, base: Model, experts: Sequence[Expert], factors: ScalesByTensor, adds_to_base: bool
) -> None:
    """Check that the method can use the experts' scales, and the factors of `lewis.aim`, and that their shapes fit.

    Raises:
        InputError: naming the model and the tensor that do not fit.
    """
    if any(expert.scales for expert in experts) and not settings.method.takes_scales:
        raise InputError(f"lewis.prune_by: {settings.method.name} does not trim by size; use magnitude")
    if factors and not adds_to_base:
        raise InputError(f"lewis.aim: {settings.method.name} merges no task vectors, whose sum could be reduced")
    for model, scales in ((str(settings.base), factors), *((each.ref, each.scales or {}) for each in experts)):
        for name, scale in scales.items():
            shape = base.tensors[name].shape if name in base.tensors else ()
            axes = zip(shape[len(shape) - scale.dim() :], scale.shape, strict=False)
            if len(shape) < scale.dim() or any(size not in (1, length) for length, size in axes):
                raise InputError(
                    f"{model}: activations of shape {list(scale.shape)} do not fit {name!r}, "
                    f"{list(shape)}; measure the importance of this model again"
                )


def check_calibrations(
    method: Method, experts: Sequence[Expert], names: Sequence[str], parameters: Callable[[str], Mapping[str, Any]]
) -> None:
    """Check that every expert of a method that fits has calibration rows, and enough of them if the ridge is tuned.

    A method that fits statically can do with empty sets, if it has a prior.

    Args:
        method: the merge method.
        experts: the experts that are merged.
        names: names of the tensors that are merged.
        parameters: returns the parameters of one tensor.

    Raises:
        InputError: naming the expert, or the parameter.
    """
    if not method.fits:
        return
    tunes = bool(names) and parameters(names[0])["ridge"] == AUTO
    if all(expert.calibration is not None and not expert.calibration.samples for expert in experts):
        if tunes or any(not parameters(name)["prior"] for name in names):
            raise InputError(
                f"{method.name} without lewis.calibrations fits to the task vectors alone: give parameters.ridge a "
                "number, and parameters.prior one above 0; or give each expert calibration rows"
            )
        return
    if lacking := [expert.ref for expert in experts if expert.calibration is None]:
        raise InputError(f"{lacking[0]}: {method.name} needs its calibration set; see lewis.calibrations")
    for expert in experts if tunes else ():
        if expert.calibration and expert.calibration.answered and expert.held_back is None:
            check_split(expert.ref, expert.calibration)


def check_adapter(settings: MergeSettings, base: Model, *, new_vocabulary: bool) -> None:
    """Check that an adapter, if one is written, has a base that is no adapter or GGUF file and keeps its vocabulary.

    Raises:
        InputError: if no adapter can be written.
    """
    if settings.output.kind != "lora":
        return
    if isinstance(base, LoraExpert):
        raise InputError(
            f"output.kind: the base {settings.base} is an adapter on a model itself, and PEFT puts one on a full "
            "model; merge the base's adapter into it first, or use full"
        )
    if is_of_gguf(base.home):
        raise InputError(
            f"output.kind: the base {settings.base} is a GGUF file, on which PEFT puts no adapter; use the model's "
            "safetensors as the base, or use full"
        )
    if new_vocabulary:
        raise InputError(
            "output.kind: an adapter has its base's vocabulary, and the result has another one here; leave the "
            "tokenizer out, or use full"
        )
