"""Checks that span several blocks of a recipe, on validated values.

Each yields problems, as lines that begin with a YAML path.
"""

import os
import re
from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path

from lewis.errors import nearest
from lewis.methods import METHODS, Method
from lewis.recipe.block import Parameters, parts_of
from lewis.recipe.config import MergeConfig, Part
from lewis.recipe.parameter_values import Rule, problems_of, value_at
from lewis.recipe.schema import Evaluate, Lewis, Publish, Register
from lewis.recipe.serve import Target
from lewis.recipe.tokenizer import TokenRow

_REPO = re.compile(r"\w[\w.-]*/[\w.-]+")


def of_models(config: MergeConfig) -> Iterator[str]:
    """Yield the problems of the models, and of the base."""
    method = METHODS.get(config.merge_method)
    if not config.models:
        yield "models: missing; it is required"
        return
    yield from _of_slices(config)
    for part in config.parts:
        names = [each.model for each in part.models.values()]
        for i, path in enumerate(part.models):
            if names[i] in names[:i]:
                yield f"{path}.model: {names[i]!r} is listed twice; give it once, with the sum of the weights"
        if set(names) == {part.base}:
            yield f"{part.where}: only the base is listed; add an expert"
        if method and method.needs_base and not part.base:
            what = "merges task vectors and" if method.on == "task_vectors" else "starts from a base and"
            yield f"base_model: {method.name} {what} needs one"
        elif method:
            merged = {*names, part.base} - {None} if method.base_is_a_model else {*names} - {part.base}
            counted = "the base included" if method.base_is_a_model else "not counting the base"
            yield from (f"{part.where}: {problem}" for problem in _of_count(method, len(merged), counted))
    if config.exclude and not config.base_model:
        yield "exclude: what is excluded is copied from the base; set base_model"


def _of_slices(config: MergeConfig) -> Iterator[str]:
    if config.slices and "models" in config.model_fields_set:
        yield "slices: expected either models or slices, got both; remove one"
    sets: dict[str, str] = {}
    for part in config.parts if config.slices else ():
        if part.base is not None and part.base not in [each.model for each in part.models.values()]:
            yield (
                f"{part.where}: the base {part.base!r} is not among them; list it with the layer_range that the others "
                "are merged onto"
            )
        for path, each in part.models.items():
            if each.calibration is not None and sets.setdefault(each.model, each.calibration) != each.calibration:
                yield f"{path}.calibration: {each.model!r} has {sets[each.model]!r} in another slice"


def _of_count(method: Method, count: int, counted: str) -> Iterator[str]:
    low, high = method.experts
    if count < low or (high is not None and count > high):
        wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        yield f"{method.name} merges {wanted} model{'' if low == high == 1 else 's'}, {counted}; got {count}"


def of_parameters(config: MergeConfig, lewis: Lewis | None) -> Iterator[str]:
    """Yield the problems of the method's parameters: unknown or missing ones, wrong values, values that do not fit."""
    method = METHODS.get(config.merge_method)
    if method is None:
        return
    found = [problem for part in config.parts for problem in _of_part(part, method)]
    yield from found
    unlisted = not config.slices and config.base_model not in (None, *config.places)
    if config.merge_method == "linear" and unlisted and "weight" not in config.parameters:
        yield "base_model: it takes part in a linear merge: list it under models with a weight, or leave it out"
    for part in config.parts if not found else ():
        experts = {path: each for path, each in part.models.items() if each.model != part.base}
        for path, each in experts.items():
            where = f"{path}.parameters" if each.parameters else "parameters"
            blocks = [each.parameters, *part.common.values()]
            yield from _of_values(where, blocks, method, len(experts), lewis)


def _of_part(part: Part, method: Method) -> Iterator[str]:
    for path, each in part.models.items():
        yield from problems_of(f"{path}.parameters", each.parameters, method, of_expert=True)
    for path, block in part.common.items():
        yield from problems_of(path, block, method)
    for name, parameter in method.parameters.items():
        if parameter.required and not any(name in block for block in part.common.values()):
            lacking = [f"{path}.parameters" for path, each in part.models.items() if name not in each.parameters]
            for where in lacking if parameter.per_expert else ["parameters"]:
                yield f"{where}.{name}: missing; {method.name} needs it"


def _of_values(
    where: str, blocks: Sequence[Parameters], method: Method, experts: int, lewis: Lewis | None
) -> Iterator[str]:
    """Yield the problems between an expert's values for the same layer: at each depth that a gradient names.

    With filters the values depend on the tensor: `lewis.merging.checks` checks them when the names are known.

    Args:
        where: the YAML path of the values.
        blocks: the blocks in which a parameter is looked up, in order.
        method: the method that takes them.
        experts: how many experts are merged.
        lewis: the block that decides the densities; None: there is none.
    """
    settings, densities = ChainMap(*map(dict, blocks)), list[dict[str, float]]()
    if lewis is not None and "density" in method.parameters:
        where, densities = "lewis.density", [{"density": each} for each in lewis.density.bounds]
        settings = settings.new_child({"density": (Rule(lewis.density.min),)})
    rules = [rule for name in method.parameters for rule in settings.get(name, ())]
    if method.check is None or not all(rule.for_all for rule in rules):
        return
    for depth in sorted({i / max(len(rule.values) - 1, 1) for rule in rules for i in range(len(rule.values))} | {0.0}):
        values = {
            name: value_at(settings[name], "", depth, parameter.parse) if name in settings else parameter.default
            for name, parameter in method.parameters.items()
        }
        for density in densities or [{}]:
            with method.blamed(where):
                problem = method.check(values | density, experts)
            if problem:
                yield f"{where}: {problem}"


def of_anchor(config: MergeConfig, lewis: Lewis | None) -> Iterator[str]:
    """Yield the problems of the anchor with the merge: what it is of no use to, and how many models it takes."""
    anchor, method = config.anchor, METHODS.get(config.merge_method)
    if anchor is None or method is None:
        return
    if not method.fits:
        fitting = ", ".join(name for name, each in METHODS.items() if each.fits)
        yield f"anchor: {method.name} fits nothing that it could pull; remove it, or use one of {fitting}"
        return
    if "lambda" in config.parameters:
        yield (
            "parameters.lambda: it scales the sum that the anchor takes the place of; use anchor.weight, or "
            "anchor.parameters.lambda"
        )
    count = len({entry.model for entry in config.models} - {config.base_model})
    guided = lewis if lewis and lewis.guides else None
    for problem in _of_count(anchor.method, count, "not counting the base") if count else ():
        yield f"anchor.merge_method: {problem}"
    yield from _of_values("anchor.parameters", [anchor.parameters], anchor.method, count, guided)


def of_lewis(config: MergeConfig, lewis: Lewis | None) -> Iterator[str]:
    """Yield the keys of the `lewis` block that the method cannot use, and what a fit lacks in it."""
    method = METHODS.get(config.merge_method)
    fits = method.fits if method else None
    if method and fits:
        yield from _of_fit(config, lewis, method)
    elif method and lewis:
        yield from _of_guided(lewis, method)
    if lewis and lewis.hold_back is not None and not fits:
        yield "lewis.hold_back: it judges a fit, and this method fits nothing; leave it out"
    if lewis and lewis.refine and fits != "forward":
        yield "lewis.refine: only a fit in forward order is trained further; use regmean_forward"
    elif lewis and lewis.refine and lewis.hold_back is False:
        yield "lewis.refine: held-back rows decide when it ends; leave hold_back: false out"


def _of_fit(config: MergeConfig, lewis: Lewis | None, method: Method) -> Iterator[str]:
    static, anchor, guides = method.fits == "static", config.anchor, lewis.guides if lewis else []
    if not (lewis and lewis.calibrations) and (lewis or not static):
        other = "leave lewis out" if static else "take merge_method: regmean without it"
        yield (
            f"lewis.calibrations: missing; {method.name} fits the projections to the experts on calibration rows; add "
            'lewis: {calibrations: {NAME: {dataset: ..., prompt: "{question}", answer: "{answer}"}}}'
            f", or {other}, which fits to the task vectors alone"
        )
    if lewis and anchor and guides:
        yield from _of_guided(lewis, anchor.method)
    for key in guides if anchor is None else ():
        why = f"{method.name} keeps whole task vectors and has no use for it"
        yield f"lewis.{key}: {why}; remove it, or let it guide an anchor"


def _of_guided(lewis: Lewis, method: Method) -> Iterator[str]:
    if "density" not in method.parameters:
        trimming = ", ".join(name for name, other in METHODS.items() if "density" in other.parameters)
        yield f"lewis: {method.name} takes no density to guide; use one of {trimming}"
    elif lewis.prune_by == "activation" and not method.takes_scales:
        trimming = ", ".join(name for name, other in METHODS.items() if other.takes_scales)
        yield f"lewis.prune_by: {method.name} does not trim by size; expected magnitude, or one of {trimming}"


def of_calibrations(config: MergeConfig, lewis: Lewis | None) -> Iterator[str]:
    """Yield a problem for each model without a calibration set, and for each set without the models that it needs."""
    method, sets = METHODS.get(config.merge_method), lewis.calibrations if lewis else {}
    fits, runs, base = bool(method and method.fits), bool(lewis and lewis.runs_models), config.base_model
    if runs and not sets and not fits:
        yield "lewis.calibrations: LEWIS runs models on calibration rows and needs at least one set of them"
    places = config.places
    for entry in config.models:
        wanted, where = entry.calibration, f"{places[entry.model]}.calibration"
        if wanted is None and len(sets) > 1 and (runs or fits) and entry.model != base:
            yield f"{where}: missing, and there is more than one set; expected one of {', '.join(sets)}"
        elif wanted is not None and lewis is None:
            yield f"{where}: there is no lewis block that defines {wanted!r}"
        elif wanted is not None and wanted not in sets:
            yield f"{where}: no calibration set {wanted!r}{nearest(wanted, sets)}"
    for name in [name for name, each in sets.items() if each.continues]:
        used = {each.model: each.calibration or next(iter(sets)) for each in config.models if each.model != base}
        if len(writers := [model for model, given in used.items() if given == name]) != 1:
            yield (
                f"lewis.calibrations.{name}.continue: expected one expert that names this set, and so writes its "
                f"answers, got {len(writers)}{': ' + ', '.join(writers) if writers else ''}; give each expert a set"
            )
    for i, each in enumerate(config.slices or ()) if lewis else ():
        if each.base_model not in (None, base):
            yield (
                f"slices[{i}].base_model: the lewis block compares all experts with one base; leave one of the two out"
            )


def of_tokenizer(config: MergeConfig) -> Iterator[str]:
    """Yield a problem for each model that the vocabulary comes from and that is not merged."""
    models, block = {config.base_model, *config.places}, config.tokenizer
    if config.tokenizer_source is not None and block is not None:
        yield "tokenizer: expected it or tokenizer_source, got both; remove one"
    sources = {"tokenizer_source": config.tokenizer_source, "tokenizer.source": block.source if block else None}
    for where, given in sources.items():
        if given not in (None, "base", "union", *models):
            yield f"{where}: expected base, union or one of the models, got {given!r}"
    for token, own in block.tokens.items() if block else ():
        row = own.source.model if isinstance(own.source, TokenRow) else own.source
        if row is not None and row not in models:
            yield f"tokenizer.tokens.{token}.source: expected one of the models, got {row!r}"


def of_release(
    config: MergeConfig,
    evaluate: Evaluate | None,
    register: Register | None,
    publish: Publish | None,
    serve: Sequence[Target],
) -> Iterator[str]:
    """Yield the problems of what a run writes, scores, registers, publishes and serves."""
    gate = register.gate if register else None
    if config.output.kind == "lora" and not config.base_model:
        yield "output.kind: an adapter sits on a base; set base_model, or use full"
    if gate and not evaluate:
        yield "register.gate: there is nothing to compare; add an evaluate block"
    if evaluate and evaluate.stop != "never" and not gate:
        yield "evaluate.stop: it ends once the gate's verdict is known; add register.gate, or leave it out"
    if publish and not register:
        yield "publish: what is published is the champion of a registered model; add a register block"
    if serve and not register:
        yield "serve: what is served is the champion of a registered model; add a register block"
    for i, each in enumerate(serve):
        if each.kind in ("vllm", "haproxy") and config.output.kind != "lora":
            yield f"serve[{i}].kind: vLLM loads adapters; set output.kind to lora"


def of_spellings(config: MergeConfig, root: Path) -> Iterator[str]:
    """Yield the models that are named in different spellings: by two paths, or by two names of one Hub commit.

    Args:
        config: names the models.
        root: the folder that relative paths start from.
    """
    named = {"base_model": config.base_model} if config.base_model else {}
    first: dict[tuple[str, ...], tuple[str, str]] = {}
    for path, name in (named | {f"{path}.model": name for name, path in config.places.items()}).items():
        where, known = first.setdefault(_place(name, root), (path, name))
        if known != name:
            yield f"{path}: {name!r} is {where} {known!r}, written in another way; give it once"


def _place(ref: str, root: Path) -> tuple[str, ...]:
    """Return a reference's parts in one spelling: folders and files by their real paths, Hub repos by `_repo`."""
    parts = parts_of(ref, root)
    places = [(os.path.join(root, os.path.expanduser(part)), os.path.expanduser(part)) for part in parts]
    found = [next(filter(_is_model, each), None) for each in places]
    return tuple(os.path.realpath(each) if each else _repo(part) for each, part in zip(found, parts, strict=True))


def _is_model(path: str) -> bool:
    return os.path.isdir(path) or (path.endswith(".gguf") and os.path.isfile(path))


def _repo(part: str) -> str:
    """Return a Hub repo in one spelling: lower case, as the Hub ignores case, with `@main` for a missing revision."""
    name, _, revision = part.partition("@")
    return f"{name.lower()}@{revision or 'main'}" if _REPO.fullmatch(name) else part
