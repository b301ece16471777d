"""A merge before it is run: checked inputs, the layout of the result, each tensor's parameters, and the digest.

Experts are put in the order of their keys, and random streams are keyed by (seed, expert key, tensor name): the order
of the models in a recipe changes nothing. Both engines, `compiled` and `in_torch`, merge what a `Prepared` describes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from lewis import store
from lewis.allocation.densities import Densities, ScalesByTensor, fingerprint
from lewis.devices import default_device, precision
from lewis.errors import InputError
from lewis.importance.calibration import EVERY
from lewis.importance.gram_files import SEMANTICS as GRAMS_SEMANTICS
from lewis.lazy_torch import torch
from lewis.merging.calibration_rows import RIDGES, by_prompt
from lewis.merging.checks import check_adapter, check_calibrations, check_parameters, check_scales
from lewis.merging.memory_budget import MemoryBudget
from lewis.merging.settings import Expert, MergeSettings
from lewis.merging.vocabulary.alignment import Alignment, align
from lewis.methods import Method, Parameter
from lewis.methods.arithmetic.streams import Stream
from lewis.methods.arithmetic.sums import least_divisor
from lewis.methods.loops import Combine
from lewis.methods.registry import AUTO
from lewis.models.chat_template import chosen_template
from lewis.models.compatible import check_compatible
from lewis.models.dtypes import size_of
from lewis.models.files.folder import processor_files, tokenizer_files
from lewis.models.lora.expert import LoraExpert
from lewis.models.model import Model
from lewis.models.names import NUMBER, STATES_SEMANTICS, weighed_before
from lewis.models.tokenizer import tokenizer_folder
from lewis.recipe.schema import Refine

# Bump one of these when the same inputs would give other bytes:
SEMANTICS = "6"  # in any merge
STATIC_SEMANTICS = "3"  # in a static fit
FIT_SEMANTICS = "3"  # in a fit in forward order
UNCALLED_SEMANTICS = "1"  # in such a fit of a model that uses weights without calling their modules
STREAM_SEMANTICS = "1"  # in such a fit of a model whose residual stream earlier versions did not find
STACKED_SEMANTICS = "3"  # in such a fit of stacked experts
HEAD_SEMANTICS = "1"  # in the fit of a head that experts have moved
LENGTH_SEMANTICS = "1"  # in the length of a fit's moves, where that is chosen
REFINE_SEMANTICS = "3"  # in the training after a fit
JUDGE_SEMANTICS = "3"  # in a fit that is judged on held-back rows
CANCELLING_SEMANTICS = "2"  # in an election in which weights have opposite signs
# Parts of the names of uncalled weights (Mamba, Switch Transformers), and of blocks that are one weight (Gemma 3n).
_UNCALLED = (".dt_proj.", ".router.classifier.", ".altup_")
_WITHOUT_STREAM = (".attn.attention.", "tokens_embed.")  # parts of the names of tensors of GPT-Neo and GPT


@dataclass(frozen=True, eq=False)
class Prepared:
    """A merge that has been checked. `of` makes one; `dataclasses.replace` makes a variant, which has its own digest.

    Attributes:
        settings: the settings that `of` was given.
        base: the base, or the first model if there is none; its embeddings are read in the result's vocabulary.
        experts: the experts in the order of their keys, also read in the result's vocabulary.
        adds_to_base: whether task vectors are merged and the result is added to the base.
        vocabulary: the vocabulary and the tokenizer of the result.
        excluded: names of the tensors that are copied from the base, in its dtype.
        budget: limits how many elements are merged in torch at a time.
        factors: tensor name -> what its merged delta is multiplied with (`lewis.allocation.aim`).
        device: where the methods compute.
        chat_template: the tokenizer's new one, as Jinja text; None: it keeps its own.
        anchor: of a method that fits, the merge that the fit is pulled towards; None without one.
        holds_back: whether rows were to be held back; an expert with too few usable ones has none.
        refine: of a method that fits in forward order, how the fit is trained further; None: it is not.
        gpu: the GPU that measures statistics and trains, by torch's name, where there is one.
    """

    settings: MergeSettings
    base: Model
    experts: tuple[Expert, ...]
    adds_to_base: bool
    vocabulary: Alignment
    excluded: frozenset[str]
    budget: MemoryBudget
    factors: ScalesByTensor = field(default_factory=dict)
    device: str = "cpu"
    chat_template: str | None = None
    anchor: Prepared | None = None
    holds_back: bool = False
    refine: Refine | None = None
    gpu: str = "cuda"

    @classmethod
    def of(
        cls,
        settings: MergeSettings,
        base: Model | None,
        experts: Sequence[Expert],
        factors: ScalesByTensor | None = None,
        device: str = "cpu",
        vocabulary: Alignment | None = None,
    ) -> Self:
        """Prepare a merge: check that the models fit together, and the parameters and scales fit the models.

        Args:
            settings: the settings of the merge.
            base: the base, or None for a method on weights without one.
            experts: all models to merge, as `MergeConfig.experts` lists them.
            factors: tensor name -> what its merged delta is multiplied with.
            device: where the methods compute, by torch's name.
            vocabulary: the models' common one, if they have been matched by token already.

        Raises:
            InputError: naming every tensor, vocabulary or parameter that does not fit.
        """
        by_key, first = sorted(experts, key=lambda expert: expert.model.key), base or experts[0].model
        by_token = settings.vocabulary is not None or vocabulary is not None
        if vocabulary is None:
            base_ref = None if base is None else settings.base
            vocabulary = align(settings.vocabulary, base_ref, first, [(each.ref, each.model) for each in by_key])
        read, fits = vocabulary.of(first), settings.method.fits is not None
        largest = max((info.elements for info in read.tensors.values()), default=0)
        made = cls(
            settings,
            read,
            tuple(_aligned(vocabulary, first, expert, fits) for expert in by_key),
            settings.method.on == "task_vectors" or (settings.method.on == "either" and base is not None),
            vocabulary,
            settings.excluded(read.tensors, read.tied),
            MemoryBudget(largest + largest // 4),  # small tensors are merged next to the largest
            factors or {},
            device,
        )
        check_compatible(read, [each.model for each in made.experts], made.excluded, by_token=by_token)
        if made.excluded >= {name for name, info in read.tensors.items() if info.floating}:
            raise InputError("exclude: it matches every tensor; nothing is left to merge")
        folders = [tokenizer_folder(model) for model in (first, *(expert.model for expert in by_key))]
        made = replace(made, chat_template=chosen_template(settings.chat_template, folders))
        if settings.anchor:  # densities of the recipe are the anchor's
            anchor = Prepared.of(settings.anchor, base, experts, made._weighted_factors(), device)
            unscaled = tuple(replace(expert, scales=None) for expert in made.experts)
            made = replace(made, anchor=anchor, factors={}, experts=unscaled)
        names = [name for name in read.tensors if name not in made.excluded]
        check_parameters(made.method, names, made.experts, made.parameters)
        check_scales(settings, read, made.experts, made.factors, made.adds_to_base)
        check_calibrations(made.method, made.experts, names, made.parameters)
        check_adapter(settings, read, new_vocabulary=vocabulary.target is not None)
        return made

    @property
    def method(self) -> Method:
        """The merge method."""
        return self.settings.method

    @property
    def pass_device(self) -> str:
        """Where statistics are measured and training computes: `gpu` if this machine has one, else `cpu`."""
        return self.gpu if default_device() != "cpu" else "cpu"

    @cached_property
    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> dtype and shape of the output."""
        dtype = self.settings.dtype
        return {
            name: (dtype or info.dtype if self.merges(name) else info.dtype, info.shape)
            for name, info in self.base.tensors.items()
        }

    @cached_property
    def size(self) -> int:
        """Bytes of the output's tensors."""
        return sum(size_of(dtype, shape) for dtype, shape in self.layout.values())

    @cached_property
    def elements(self) -> int:
        """Number of elements of the output's tensors."""
        return sum(math.prod(shape) for _, shape in self.layout.values())

    @property
    def traffic(self) -> int:
        """Bytes of the tensors of all inputs and of the output; an adapter, which is small, is not counted."""
        inputs = {model.key: model for model in self.models}
        return (0 if self.as_adapter else self.size) + sum(
            size_of(info.dtype, info.shape) for model in inputs.values() for info in model.tensors.values()
        )

    @property
    def tunes(self) -> bool:
        """Whether the ridge of the fit has yet to be found: `ridge: auto`."""
        return self.method.fits is not None and self.parameters(next(iter(self.layout)))["ridge"] == AUTO

    @cached_property
    def judging(self) -> tuple[Expert, ...]:
        """Of a method that fits, the experts whose rows judge the fit: not those with a weight of 0 everywhere."""
        weights = [self.parameters(name)["weight"] for name in self.layout if self.merges(name)]
        counted = (each for i, each in enumerate(self.experts) if any(of_tensor[i] for of_tensor in weights))
        return tuple(counted) or self.experts

    def _weighted_factors(self) -> ScalesByTensor:
        """The factors that the anchor's merged deltas are multiplied with: this merge's, times the anchor's weight."""
        factors = dict(self.factors)
        for name in filter(self.merges, self.layout):
            weight = self.settings.anchor_weight(name, self._depth(name))
            if weight != 1:
                factors[name] = weight * factors.get(name, torch.ones(()))
        return factors

    def with_densities(self, densities: Densities) -> Self:
        """The same merge with these densities for every expert, in the anchor if there is one."""
        if self.anchor is not None:
            return replace(self, anchor=self.anchor.with_densities(densities))
        return replace(self, experts=tuple(replace(expert, densities=densities) for expert in self.experts))

    def with_parameters(self, change: Callable[[Parameter, Any], Any]) -> Self:
        """The same merge with other values of its own parameters, not of its anchor's.

        Args:
            change: gives the new value of a parameter, by the parameter and its value.
        """
        value = self.settings.value

        def changed(parameter: Parameter, *where: Any) -> Any:
            return change(parameter, value(parameter, *where))

        return replace(self, settings=replace(self.settings, value=changed))

    def maker_of(self, name: str) -> Prepared:
        """The merge that makes a tensor that is not fitted, and that a fit is pulled towards: the anchor or this."""
        return self.anchor or self

    @property
    def models(self) -> list[Model]:
        """The base, then the experts."""
        return [self.base, *(expert.model for expert in self.experts)]

    def models_with(self, name: str) -> list[Model]:
        """The models that are read for one tensor: only the base if it is excluded."""
        return self.models[: 1 if name in self.excluded else None]

    @property
    def as_adapter(self) -> bool:
        """Whether a LoRA adapter is written instead of the full model."""
        return self.settings.output.kind == "lora"

    def merges(self, name: str) -> bool:
        """Whether a tensor is merged; the base's is copied if it is excluded or not floating-point."""
        return name not in self.excluded and self.base.tensors[name].floating

    def compiles(self, name: str) -> bool:
        """Whether there are compiled loops for one tensor's method and parameters."""
        if not self.method.coefficients:
            return self.method.compiled is not None
        try:
            with self.method.blamed(name):
                return self.coefficients(name, np.eye(len(self.experts) + self.method.takes_base)) is not None
        except ValueError:  # the method's function raises it again, and names the tensor
            return False

    def coefficients(self, name: str, gram: np.ndarray) -> list[float] | None:
        """The method's coefficients for one tensor, by the dot products `gram`; None if its parameters give none.

        Raises:
            TypeError: if they are not one number for each row of `gram`; `Row.blamed` names the method.
        """
        assert self.method.coefficients
        found = self.method.coefficients(gram, **self.method.arguments(self.parameters(name)))
        if found is not None and np.shape(found) != (len(gram),):
            raise TypeError(f"its `coefficients` gave {found!r}, expected a list of {len(gram)} numbers")
        return found

    def parameters(self, name: str) -> dict[str, Any]:
        """The method's parameters for one tensor; for a parameter per expert, a list in the experts' order."""
        value, depth = self.settings.value, self._depth(name)
        values: dict[str, Any] = {}
        for parameter in self.method.parameters.values():
            if parameter.per_expert:
                values[parameter.name] = [value(parameter, expert.ref, name, depth) for expert in self.experts]
            else:
                values[parameter.name] = value(parameter, None, name, depth)
        if "density" in values:
            each = zip(self.experts, values["density"], strict=True)
            values["density"] = [(expert.densities or {}).get(name, own) for expert, own in each]
        if self.settings.anchor and values["ridge"] != AUTO:
            values["ridge"] *= self._ridge_factor(name)
        return values

    def _depth(self, name: str) -> float:
        """The position of a tensor's layer in its stack of layers, in [0, 1], for gradients; 0 outside the layers."""
        match = NUMBER.search(name)
        if match is None:
            return 0.0
        last = self._last_layers[name[: match.start(1)]]
        return int(match[1]) / last if last else 1.0

    @cached_property
    def _last_layers(self) -> Mapping[str, int]:
        """Prefix of a stack of layers (`model.layers.`) -> number of its last layer; each tower has its own stack."""
        found: dict[str, int] = {}
        for match in filter(None, map(NUMBER.search, self.base.tensors)):
            stack = match.string[: match.start(1)]
            found[stack] = max(found.get(stack, 0), int(match[1]))
        return found

    def _ridge_factor(self, name: str) -> float:
        """How much harder than on average a tensor is pulled towards a guided anchor: mean density / its density.

        Both are means over the experts. A density below 0.01 counts as 0.01.
        """
        if any(expert.densities is None or name not in expert.densities for expert in self.experts):
            return 1.0
        density = sum((expert.densities or {})[name] for expert in self.experts)
        return sum(expert.mean_density for expert in self.experts) / max(density, 0.01 * len(self.experts))

    def active(self, name: str, values: Mapping[str, Any]) -> list[bool]:
        """Which experts take part in the merge of a tensor, given the method's parameters for it."""
        elements = self.base.tensors[name].elements
        density = values.get("density", [1.0] * len(self.experts))
        # A random method may keep elements of a tensor that is too small for an exact share.
        kept = [d > 0 if self.method.random else int(d * elements) > 0 for d in density]
        weights = values.get("weight", kept)
        if not isinstance(weights, list):  # a method of another package may have one for all experts
            weights = [weights] * len(kept)
        return [k and w != 0 for k, w in zip(kept, weights, strict=True)]

    def stream(self, expert: Expert, name: str) -> Stream:
        """The random stream of one expert's tensor."""
        return random_stream(self.settings.seed, expert.model.key, name)

    def scales(self, name: str) -> list[torch.Tensor | None]:
        """For each expert, what the magnitudes in a tensor are multiplied with before they are ranked, or None."""
        return [(expert.scales or {}).get(name) for expert in self.experts]

    def _fit_digest(self) -> list[Any]:
        sets: list[Any] = [expert.calibration.digest for expert in self.experts if expert.calibration]
        split = [each.calibration for each in self.experts if each.calibration and not each.held_back]
        together = any(each.prompts or len(by_prompt(each)) < len(each.samples) for each in split)
        rule = [AUTO, JUDGE_SEMANTICS, RIDGES, EVERY, *(["by prompt"] if together else [])]
        rule += [[each.model.key for each in self.judging]] if len(self.judging) < len(self.experts) else []
        sets += [rule] if self.tunes else []
        judging = {each.ref for each in self.judging}
        held = [each.held_back.digest if each.held_back and each.ref in judging else "" for each in self.experts]
        sets += [["held back", JUDGE_SEMANTICS, held]] if any(held) else []
        sets += [["length", LENGTH_SEMANTICS]] if self.may_lengthen else []
        if self.refine:
            sets.append(["refine", REFINE_SEMANTICS, default_device(), self.refine.model_dump()])
        weighted = any(each.calibration and each.calibration.weights for each in self.experts)
        sets += [STATES_SEMANTICS] if weighted and weighed_before(self.base.tensors) else []
        if self.method.fits == "static":  # to statistics, which depend on the number format of the passes
            return [STATIC_SEMANTICS, GRAMS_SEMANTICS, precision(default_device()), *sets]
        stacked = any(
            ".experts." in n or (len(t.shape) == 3 and min(t.shape) > 1) for n, t in self.base.tensors.items()
        )
        uncalled, stream = (
            any(part in n for n in self.base.tensors for part in parts) for parts in (_UNCALLED, _WITHOUT_STREAM)
        )
        return [
            FIT_SEMANTICS,
            *(["stacked", STACKED_SEMANTICS] if stacked else []),
            *(["uncalled", UNCALLED_SEMANTICS] if uncalled else []),
            *(["stream", STREAM_SEMANTICS] if stream else []),
            *(["head", HEAD_SEMANTICS] if self.may_move_head else []),
            *sets,
        ]

    @property
    def may_lengthen(self) -> bool:
        """Whether held-back rows choose how long the moves of the fit are: of experts that are no adapters of the base.

        With adapters alone a move that is longer than the fit's brought none closer to them.
        """
        judged = self.method.fits == "forward" and any(expert.held_back for expert in self.judging)
        models = [expert.model for expert in self.experts]
        return judged and not all(isinstance(m, LoraExpert) and m.base.key == self.base.key for m in models)

    @property
    def may_move_head(self) -> bool:
        """Whether an expert may have other weights outside of the blocks than the base: no adapter of the blocks."""
        outside = [name for name in self.base.tensors if not NUMBER.search(name)]
        return any(
            not isinstance(model, LoraExpert) or model.base.key != self.base.key or any(map(model.touches, outside))
            for model in (expert.model for expert in self.experts)
        )

    def nothing_to_fit(self) -> InputError:
        """The error to raise if a fit finds no projection to fit."""
        return InputError(
            f"{self.base.folder}: no projection that {self.method.name} could fit; use another merge_method"
        )

    def _resolved(self, name: str) -> dict[str, Any]:
        """A tensor's parameters for the digest: without `alpha` and `prior`, added later, where they do nothing."""
        values = self.parameters(name)
        later = {"alpha": 1.0, "prior": 0.0} if self.method.fits else {}
        values = {name: value for name, value in values.items() if name not in later or value != later[name]}
        loops, weights = self.method.compiled, values.get("weight", [])
        elects = loops is not None and loops.combine == Combine.ELECT and values.get("normalize")
        if elects and len(weights) > 2 and least_divisor(weights):
            values["cancelling"] = CANCELLING_SEMANTICS
        return values

    @property
    def base_name(self) -> str:
        """How an adapter names its base: `org/name@commit`, or the absolute path of a folder; empty without a base."""
        if self.settings.base is None:
            return ""
        return str(self.settings.base_folder or f"{self.settings.base.partition('@')[0]}@{self.base.key}")

    @cached_property
    def digest(self) -> str:
        """Identity of the result: every input's key, every parameter that changes a byte, the code's semantics.

        Parameters are hashed as resolved for each tensor: two recipes that give the same bytes have the same digest.
        """
        resolved = [[name, self._resolved(name)] for name in self.base.tensors if self.merges(name)]
        return store.digest(
            {
                "semantics": SEMANTICS,
                "method": self.method.name,
                "base": self.base.key,
                "experts": [expert.model.key for expert in self.experts],
                "parameters": resolved,
                "layout": [[name, dtype, list(shape)] for name, (dtype, shape) in self.layout.items()],
                "seed": self.settings.seed if self.method.random else None,
                **({"device": torch.device(self.device).type} if self.device != "cpu" else {}),
                **({"excluded": sorted(self.excluded)} if self.excluded else {}),
                **({"chat_template": self.chat_template} if self.chat_template else {}),
                **({"plugin": self.method.origin} if self.method.origin else {}),
                **({"scales": scales} if any(scales := [fingerprint(e.scales) for e in self.experts]) else {}),
                **({"held_back": factors} if (factors := fingerprint(self.factors)) else {}),
                **({"fit": self._fit_digest()} if self.method.fits else {}),
                **({"anchor": self.anchor.digest} if self.anchor else {}),
                **({"output": [self.settings.output.model_dump(), self.base_name]} if self.as_adapter else {}),
                **({"vocabulary": self.vocabulary.digest} if self.vocabulary.digest else {}),
                **self._copied_files(),
            }
        )

    def _copied_files(self) -> dict[str, dict[str, str]]:
        """For the digest: the checksums of the files that are copied, of the tokenizer and of the base's processors."""
        donor, home = self.vocabulary.donor, self.base.home
        groups = {"tokenizer": (donor, tokenizer_files(donor))}
        if not self.as_adapter and (processors := processor_files(home)):
            groups["processors"] = home, processors
        return {
            kind: {str(path.relative_to(folder)): store.file_sha256(path) for path in paths}
            for kind, (folder, paths) in groups.items()
        }


def _aligned(vocabulary: Alignment, base: Model, expert: Expert, fits: bool) -> Expert:
    """An expert whose model and, if the method fits, calibration rows are in the result's vocabulary."""
    rows, held_back = (
        vocabulary.translate(expert.ref, base, expert.model, each) if fits and each else each
        for each in (expert.calibration, expert.held_back)
    )
    return replace(expert, model=vocabulary.of(expert.model), calibration=rows, held_back=held_back)


def random_stream(seed: int, expert: str, tensor: str) -> Stream:
    """The random stream of one (seed, expert key, tensor name), the same on every machine."""
    key = hashlib.sha256(f"{seed}\0{expert}\0{tensor}".encode()).digest()
    return Stream(int.from_bytes(key[:8], "little"))
