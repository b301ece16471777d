"""Which of the base's tensors an adapter changes, and how: its keys, checked against the base and its own settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.models.files.folder import ADAPTER
from lewis.models.files.safetensors_file import TensorFile, same_bits
from lewis.models.lora.config import Keys, parameters_of
from lewis.models.lora.delta import AddedBias, Change, LowRank, NewRows, Replaced
from lewis.models.lora.modules import (
    CONFIG,
    by_pattern,
    check_tied,
    check_whole,
    inputs_first,
    is_on,
    is_saved,
    named_modules,
    token_indices,
)
from lewis.models.model import Model
from lewis.models.names import PER_TOKEN, unwrapped
from lewis.models.network.network_class import known_network
from lewis.models.network.placing import Layout, Run
from lewis.models.network.renamed import with_tied

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A change of a tensor's flat values `start` to `stop`, by the values from `place` on of an adapter's weight.

    Attributes:
        whole: whether the adapter's weight is the tensor itself.
    """

    start: int
    stop: int
    change: Change
    place: int = 0
    whole: bool = True


@dataclass(frozen=True)
class _Target:
    """One weight that the adapter changes.

    Attributes:
        name: as the adapter calls it.
        key: in the adapter's file, for error messages.
        change: what is applied.
        parameter: whether the name comes from `target_parameters`, and so is that of a parameter of the network.
    """

    name: str
    key: str
    change: Change
    parameter: bool = False


class Targets:
    """All changes that one adapter makes to the tensors of its base.

    Attributes:
        parts: tensor of the base -> its changes, in the order in which they are made.
        summary: how many of the changes have other names in the adapter than in the base, as a sentence; empty if none.
    """

    def __init__(self, base: Model, folder: Path, settings: Mapping[str, Any], file: TensorFile) -> None:
        """Check the adapter's keys, and find the base's tensors that they change.

        Raises:
            InputError: naming the key or the weight that does not fit.
        """
        self._base, self._settings, self._file = base, settings, file
        self._where, self._config = folder / ADAPTER, folder / CONFIG
        self._keys = Keys()
        for key in file.places:
            if not self._is_copy(key):
                self._keys.add(key, settings)
        for key in self._keys.unknown:
            raise self._no_match(key)
        for one, other in self._keys.twice:
            raise InputError(f"{self._where}: {one!r} and {other!r} stand for the same tensor; keep one adapter")
        self._parameters = self._find_parameters()
        self._leave_out()
        self._targets = [*self._replaced(), *self._low_rank(), *self._new_rows()]
        self.parts: dict[str, list[Part]] = {}
        moved = []
        for target in self._targets:
            for tensor, part in self._place(target):
                self.parts.setdefault(tensor, []).append(part)
                moved += [f"{target.name} in {tensor}"] if tensor != target.name else []
        self._check_whole()
        self.summary = f"{len(moved)} of its changes are read under the base's names ({moved[0]})" if moved else ""

    def _leave_out(self) -> None:
        """Drop tensors of the file that the settings do not name, with a warning; PEFT ignores them as well.

        Raises:
            InputError: if the settings name nothing, or a module that PEFT puts no factors on.
        """
        keys, settings, left, on = self._keys, self._settings, list(self._keys.unused), set[str]()
        for module, parts in list(keys.parts.items()):
            linear = not any("lora_embedding" in key for key in parts.values())
            if module in self._parameters or is_on(settings, module, linear=linear):
                on.add(module.split(".base_layer")[0])
                unused = {
                    part for part, key in (("magnitude", "use_dora"), ("bias", "lora_bias")) if not settings.get(key)
                }
                left += [parts.pop(part) for part in unused & parts.keys()]
            else:
                left += keys.parts.pop(module).values()
        on |= named_modules(self._base, settings, self._where.parent, found=bool(on))
        for tensor, key in list(keys.whole.items()):
            module = tensor.rpartition(".")[0]
            wrapped = module in on or module in keys.rows
            if (".base_layer." in key) != (wrapped and not is_saved(settings, tensor)):
                left.append(keys.whole.pop(tensor))
        if left:
            logger.warning(
                f"{self._where}: {len(left)} of its tensors are of no module that {CONFIG} names, and are left out, as "
                f"PEFT does: {left[0]} ..."
            )

    def _check_whole(self) -> None:
        """Check that the file has every module that the settings save whole, and that a tied head stays tied."""
        if not self.parts:
            raise InputError(
                f"{self._where}: {CONFIG} names none of its tensors; the config belongs to another adapter"
            )
        whole = {tensor for tensor, parts in self.parts.items() if any(isinstance(p.change, Replaced) for p in parts)}
        replaced, whole = whole, whole | set(map(unwrapped, self._file.places))
        for head, embedding in self._base.tied.items():
            if embedding in replaced and head not in whole:  # perhaps the network calls it otherwise, as Whisper's does
                names = self._tied_names(embedding)
                whole |= {head} if names and head not in names and names <= whole else set()
        check_whole(self._base, self._settings, self._where, whole, self._keys.rows, self._parameters.values())
        check_tied(self._base, self._settings, self._where, whole)

    def _raw(self, key: str) -> tuple[str, np.ndarray]:
        place = self._file.places[key]
        return place.dtype, self._file.bits(key).reshape(place.shape)

    def _is_copy(self, key: str) -> bool:
        """Whether a key is a tied weight that equals the base's tensor, which the file has too: PEFT saves both."""
        name, places = _in_model(key), self._file.places
        if name in self._base.tensors or ".lora_" in key or name.endswith("trainable_tokens_delta"):
            return False
        if (embedding := self._base.tied.get(name)) is not None:
            others = [each for each in places if each.endswith(f".{embedding}")]
        else:
            names = self._tied_names(name)
            others = [each for each in places if _in_model(each) in names and self._called(_in_model(each))]
        if not others:
            return False
        place, other = places[key], places[others[0]]
        alike = (place.dtype, place.shape) == (other.dtype, other.shape)
        return alike and same_bits(self._file.bits(key), self._file.bits(others[0]))

    def _tied_names(self, name: str) -> set[str]:
        """The other names of a parameter that the base's network ties; empty if transformers cannot build it."""
        network = known_network(self._base.home)
        state = {} if network is None else network.state_dict(keep_vars=True)
        return {each for each, value in state.items() if each != name and value is state.get(name)}

    def _replaced(self) -> Iterator[_Target]:
        for name, key in self._keys.whole.items():
            yield _Target(name, key, Replaced(self._raw, key, self._file.places[key].shape))

    def _new_rows(self) -> Iterator[_Target]:
        for module, key in self._keys.rows.items():
            name, shape = f"{module}.weight", self._file.places[key].shape
            if name in self._base.tied:
                raise self._changes_head(key)
            stored = self._called(name)
            if stored is None:
                raise self._no_match(key)
            known = self._base.tensors[stored].shape
            known = self._file.places[self._keys.whole[name]].shape if name in self._keys.whole else known
            ids = token_indices(self._settings, module) or []
            last = max(ids, default=0)
            if shape != (len(ids), *known[1:]) or last >= known[0]:
                raise InputError(
                    f"{self._where}: {key!r} has shape {list(shape)} for {len(ids)} tokens up to {last}, and {name!r} "
                    f"is {list(known)} in the base; expected an adapter of this base model"
                )
            yield _Target(name, key, NewRows(self._raw, key, tuple(ids), known))

    def _low_rank(self) -> Iterator[_Target]:
        parameters = self._parameters
        for module, parts in self._keys.parts.items():
            name = parameters.get(module, f"{module}.weight")
            if not parts.keys() >= {"A", "B"}:
                raise InputError(f"{self._where}: {name!r} has lora_{''.join(parts)} only; expected lora_A and lora_B")
            if module.endswith(".base_layer") and module not in parameters:
                raise self._no_match(parts["A"])
            stored = list(self._state[name].shape) if module in parameters else []
            stack = stored[0] if len(stored) == 3 else 0
            change = self._factors(name, parts, stack, self._is_transposed(name, parts, stack))
            yield _Target(name, parts["A"], change, module in parameters)
            if "bias" in parts:
                bias = parts["bias"]
                added = AddedBias(self._raw, bias, change.scale, self._file.places[bias].shape)
                yield _Target(f"{module}.bias", bias, added)

    def _factors(self, name: str, parts: Mapping[str, str], stack: int, transposed: bool) -> LowRank:
        a, b = (self._file.places[parts[part]].shape for part in "AB")
        rank = self._check_rank(name, a, b, stack or 1)
        fits, outer = len(a) == len(b) == 2 and b[1] == a[0], (stack,) if stack else ()
        shape = (*outer, *((a[1], b[0]) if transposed else (b[0], a[1]))) if fits else ()
        if expected := self._expected(name, stack):
            if shape != expected:
                raise self._unlike(name, a, b, f"the base's shape {list(expected)}")
        elif not shape:
            raise self._unlike(name, a, b, "a matrix")
        alpha = by_pattern(self._settings.get("alpha_pattern"), self._path(name), self._settings.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)
        magnitude = parts.get("magnitude")
        if bool(self._settings.get("use_dora")) != (magnitude is not None):
            raise InputError(
                f"{self._config}: use_dora is {bool(self._settings.get('use_dora'))}, but {name!r} has "
                f"{'a' if magnitude else 'no'} lora_magnitude_vector; the config belongs to another adapter"
            )
        outputs = shape[1] if transposed else shape[0]
        if magnitude and prod(self._file.places[magnitude].shape) != outputs:
            raise InputError(f"{self._where}: {magnitude!r} has not one number for each of the {outputs} outputs")
        return LowRank(self._raw, parts["A"], parts["B"], scale, shape, transposed, magnitude, stack)

    def _expected(self, name: str, stack: int) -> tuple[int, ...] | None:
        """Return the shape of a weight if it is known before the weight is placed, else None."""
        if name in self._keys.whole:
            return self._file.places[self._keys.whole[name]].shape
        if name in self._base.tensors:
            return self._base.tensors[name].shape
        return tuple(self._state[name].shape) if stack else None

    def _unlike(self, name: str, a: tuple[int, ...], b: tuple[int, ...], expected: str) -> InputError:
        return InputError(
            f"{self._where}: lora_A {list(a)} and lora_B {list(b)} of {name!r} do not give {expected}; "
            "expected an adapter of this base model"
        )

    def _check_rank(self, name: str, a: tuple[int, ...], b: tuple[int, ...], stack: int) -> int:
        if not a or not b or 0 in (*a, *b) or a[0] % stack:
            raise InputError(
                f"{self._where}: lora_A {list(a)} and lora_B {list(b)} of {name!r} are of rank 0 or empty; "
                "expected a rank of 1 or more"
            )
        stated = self._settings.get("r")
        if stated is not None:  # older files lack it
            stated = by_pattern(self._settings.get("rank_pattern"), self._path(name), stated)
            if a[0] != stated * stack:
                raise InputError(
                    f"{self._config}: r is {stated:g} for {name!r}, but its lora_A is {list(a)}; "
                    "the config belongs to another adapter"
                )
        return a[0] // stack

    def _path(self, name: str) -> str:
        """The path that patterns are matched with: a module's, or with `target_parameters` a parameter's."""
        return name if name in self._parameters.values() else name.removesuffix(".weight")

    def _is_transposed(self, name: str, parts: Mapping[str, str], stack: int) -> bool:
        """Whether the weight is stored as (in, out): an embedding, GPT-2's Conv1D, or experts of some models."""
        if stack:
            module = self._network.get_submodule(name.rpartition(".")[0])
            return bool(getattr(module, "is_transposed", False))
        if "lora_embedding_A" in parts["A"]:
            return True
        stated = bool(self._settings.get("fan_in_fan_out"))
        if not (stated or self._has_inputs_first):
            return False
        a, b = (self._file.places[parts[part]].shape for part in "AB")
        shape = self._expected(name, stack)
        if shape is not None and len(a) == len(b) == 2 and a[1] != b[0]:
            return shape == (a[1], b[0])
        network = known_network(self._base.home) if self._has_inputs_first or shape is None else None
        if network is None:
            return stated and (self._has_inputs_first or shape is None)
        modules = network.named_modules()  # whose names may begin with a part that the base's do not have
        found = (module for path, module in modules if f".{path}".endswith(f".{name.removesuffix('.weight')}"))
        return type(next(found, None)).__name__ == "Conv1D"

    @cached_property
    def _has_inputs_first(self) -> bool:
        """Whether some modules of the base store (in, out). PEFT goes by their class, not by `fan_in_fan_out`."""
        return inputs_first(self._base.shapes)

    @cached_property
    def _network(self) -> Any:
        network = known_network(self._base.home)
        if network is None:
            raise InputError(
                f"{self._where}: it changes parameters by transformers' names, and transformers cannot build the base "
                f"{self._base.home}; merge it into its base with PEFT's merge_and_unload first"
            )
        return network

    @property
    def _state(self) -> Mapping[str, Any]:
        return self._ours.placing.state

    @cached_property
    def _ours(self) -> Layout:
        return Layout(self._network, with_tied(self._base))

    @cached_property
    def _theirs(self) -> Layout:
        """The layout of the adapter's weights for which the base has no tensor of the same name."""
        known = (*self._base.tensors, *self._base.tied)
        return Layout(self._network, {t.name: t.change.shape for t in self._targets if t.name not in known})

    def _called(self, name: str) -> str | None:
        """The name in the base of a weight that the adapter changes; None if the base has no such tensor."""
        if name in self._base.tensors:
            return name
        if name in self._base.tied or known_network(self._base.home) is None:
            return None
        role = Layout(self._network, {name: ()}).roles.get(name)
        stored = self._ours.by_role.get(role) if role else None
        return stored if stored in self._base.tensors else None

    def _find_parameters(self) -> dict[str, str]:
        """Path in the adapter's keys -> the network's parameter, for an adapter with `target_parameters`."""
        targets = self._settings.get("target_parameters")
        if not targets:
            return {}
        found: dict[str, str] = {}
        for module in dict.fromkeys(path.split(".base_layer")[0] for path in self._keys.parts):
            found |= parameters_of(module, self._keys.parts, targets, self._state)
        return found

    def _place(self, target: _Target) -> Iterator[tuple[str, Part]]:
        """Yield the base's tensors that a change applies to, each with its part of the change."""
        name, change = target.name, target.change
        if name in self._base.tied:
            raise self._changes_head(target.key)
        if name in self._base.tensors:
            yield name, self._direct(name, target)
            return
        if isinstance(change, AddedBias):
            raise InputError(
                f"{self._where}: {target.key!r} adds to {name!r} (lora_bias), and the base has no such bias, so no "
                "weights stand for it; leave the adapter out"
            )
        if known_network(self._base.home) is None:
            raise self._no_match(target.key)
        if target.parameter:
            runs: tuple[Run, ...] = (Run(name, 0, prod(change.shape)),)
        else:
            role = self._theirs.roles.get(name)
            same = self._ours.by_role.get(role) if role else None
            if same in self._base.tensors:
                yield same, self._direct(same, target)
                return
            runs = self._theirs.runs.get(name, ())
        found = [self._ours.tensors_of(run) for run in runs]
        if not found or not all(found):
            raise self._no_match(target.key)
        place = 0
        for each in (run for runs in found for run in runs or ()):
            whole = each.size == prod(change.shape) == self._base.tensors[each.name].elements
            if not whole and (isinstance(change, NewRows) or getattr(change, "needs_whole", False)):
                raise InputError(
                    f"{self._where}: {target.key!r} changes a whole weight, which the base stores in several tensors; "
                    "merge this adapter with PEFT first"
                )
            yield each.name, Part(each.start, each.stop, change, place, whole)
            place += each.size

    def _direct(self, tensor: str, target: _Target) -> Part:
        shape, expected = target.change.shape, self._base.tensors[tensor].shape
        if isinstance(target.change, Replaced | AddedBias):
            per_row = int(tensor.endswith(PER_TOKEN) and isinstance(target.change, Replaced))
            if shape[per_row:] != expected[per_row:] or len(shape) != len(expected):
                raise InputError(
                    f"{self._where}: {target.key!r} has shape {list(shape)}, in the base it is {list(expected)}"
                )
        elif isinstance(target.change, LowRank) and target.name not in self._keys.whole and shape != expected:
            a, b = (self._file.places[key].shape for key in (target.change.a, target.change.b))
            raise self._unlike(tensor, a, b, f"the base's shape {list(expected)}")
        return Part(0, prod(shape), target.change)

    def _changes_head(self, key: str) -> InputError:
        return InputError(
            f"{self._where}: {key!r} changes the head, which the base ties to its embedding; "
            "merge the adapter into its base with PEFT's merge_and_unload first"
        )

    def _no_match(self, key: str) -> InputError:
        return InputError(
            f"{self._where}: the key {key!r} matches nothing in the base {self._base.folder}; "
            "expected an adapter of this base model"
        )


def _in_model(key: str) -> str:
    """The name of a whole weight in PEFT's model, by its key in an adapter's file."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
