"""Checks that span several blocks of a recipe. They read the raw YAML, so that all problems are reported together."""

import itertools
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lewis.allocators import ALLOCATORS, DEFAULT, Allocator
from lewis.errors import nearest
from lewis.methods import METHODS, Method, Parameter
from lewis.methods.registry import AUTO
from lewis.recipe import anchor, model_args, slices
from lewis.recipe.block import parts_of
from lewis.recipe.parameter_values import parse_setting
from lewis.recipe.schema import GUIDES, Density, contradictions

_REPO = re.compile(r"\w[\w.-]*/[\w.-]+")
_DEFAULTS = {key: Density.model_fields[key].default for key in ("min", "max", "budget")}


def cross_check(data: dict[str, Any]) -> list[str]:
    """List the problems of a recipe that span several blocks, each as a line that begins with its YAML path.

    Args:
        data: the raw YAML of the recipe, by `dialect.with_names`. Problems within one block are left to the schema.
    """
    problems: list[str] = []
    method = METHODS.get(str(data.get("merge_method")))
    if data.get("merge_method") is not None and method is None:
        problems.append(
            f"merge_method: unknown method {data['merge_method']!r}{nearest(str(data['merge_method']), METHODS)}"
        )
    if not _is_well_formed(data):
        return problems
    problems += anchor.problems_of(data, method) + model_args.problems_of(data)
    if not data.get("slices"):
        return problems + _check_merge(data, method) + _check_blocks(data)
    problems += slices.problems_of(data, method)
    for i, each in slices.as_merges(data, method):
        if _is_well_formed(each):
            problems += [slices.in_slice(data, i, problem) for problem in _check_merge(each, method)]
    whole = {**data, "models": slices.listed_models(data)}
    problems += _check_tokenizer(whole, [str(data.get("base_model")), *(each["model"] for each in whole["models"])])
    return problems + [slices.of_listed(data, problem) for problem in _check_blocks(whole)]


def _is_well_formed(data: dict[str, Any]) -> bool:
    """Whether each block is a mapping and `models` a list of mappings. If not, the schema reports that."""
    models, lewis, own = _models(data), data.get("lewis"), data.get("anchor")
    if not isinstance(models, list) or not all(isinstance(entry, dict) for entry in models):
        return False
    blocks = [data.get(key) for key in ("parameters", "anchor", "tokenizer", "lewis", "output", "evaluate", "register")]
    blocks += [entry.get("parameters") for entry in models]
    blocks += [lewis.get(key) for key in ("calibrations", "density", "importance")] if isinstance(lewis, dict) else []
    blocks += [own.get("parameters")] if isinstance(own, dict) else []
    return all(block is None or isinstance(block, dict) for block in blocks)


def _models(data: dict[str, Any]) -> list[dict[str, Any]]:
    return data.get("models") or []


def _check_merge(data: dict[str, Any], method: Method | None) -> list[str]:
    """List the problems of a merge: of its method, its parameters and its models."""
    if method is None:
        return _check_models(data)
    problems = _check_parameters(data, _models(data), method.name)
    if method.needs_base and not data.get("base_model"):
        what = "merges task vectors and" if method.on == "task_vectors" else "starts from a base and"
        problems.append(f"base_model: {method.name} {what} needs one")
    problems += _check_count(data, method) + _check_together(data, _models(data), method)
    problems += _check_fit(data, method) if method.fits else _check_guided(data, method)
    return problems + _check_models(data)


def _check_blocks(data: dict[str, Any]) -> list[str]:
    """List the problems of the blocks that do not define the merge itself."""
    problems = [*_check_calibrations(data), *_check_density(data), *_check_guidance(data)]
    output, register = data.get("output") or {}, data.get("register")
    if data.get("exclude") and not data.get("base_model"):
        problems.append("exclude: what is excluded is copied from the base; set base_model")
    if output.get("kind") == "lora" and not data.get("base_model"):
        problems.append("output.kind: an adapter sits on a base; set base_model, or use full")
    if register and register.get("gate") and not data.get("evaluate"):
        problems.append("register.gate: there is nothing to compare; add an evaluate block")
    if (data.get("evaluate") or {}).get("stop", "never") != "never" and not (register and register.get("gate")):
        problems.append("evaluate.stop: it ends once the gate's verdict is known; add register.gate, or leave it out")
    if data.get("publish") and not register:
        problems.append("publish: what is published is the champion of a registered model; add a register block")
    if data.get("serve") and not register:
        problems.append("serve: what is served is the champion of a registered model; add a register block")
    full = output.get("kind") != "lora"
    problems += [f"serve[{i}].kind: vLLM loads adapters; set output.kind to lora" for i in _of_vllm(data) if full]
    return problems


def _of_vllm(data: dict[str, Any]) -> list[int]:
    """Return the positions of the `serve` targets that are vLLM servers."""
    block = data.get("serve")
    targets = block if isinstance(block, list) else [block]
    return [i for i, each in enumerate(targets) if isinstance(each, dict) and each.get("kind") in ("vllm", "haproxy")]


def _check_parameters(data: dict[str, Any], models: list[dict[str, Any]], name: str) -> list[str]:
    known, common, problems = METHODS[name].parameters, data.get("parameters") or {}, list[str]()
    own = [(f"models[{i}].parameters", entry.get("parameters") or {}) for i, entry in enumerate(models)]
    for parameter in known.values():
        if parameter.required and parameter.name not in common:
            places = own if parameter.per_expert else [("parameters", common)]
            lacking = [where for where, block in places if parameter.name not in block]
            problems += [f"{where}.{parameter.name}: missing; {name} needs it" for where in lacking]
    for where, block in [*own, ("parameters", common)]:
        for key, raw in block.items():
            path = f"{where}.{key}"
            if key not in known:
                problems.append(f"{path}: {name} has no such parameter{nearest(str(key), known)}")
            elif block is not common and not known[key].per_expert:
                problems.append(f"{path}: {key} is one value for the whole merge; move it to parameters.{key}")
            else:
                problems += _check_values(path, raw, known[key])
    return problems


def _check_values(path: str, raw: Any, parameter: Parameter) -> list[str]:
    """List the problems of one parameter's values. `auto` must stand alone: it is one value for the whole merge."""
    try:
        rules = parse_setting(raw)
    except ValueError:
        return []  # the schema reports it, with its place
    values = [value for rule in rules for value in (rule.value if isinstance(rule.value, tuple) else (rule.value,))]
    problems = []
    for value in values:
        try:
            parameter.parse(value)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if not problems and parameter.auto and AUTO in values and raw != AUTO:
        problems.append(f"{path}: auto is found for the whole merge; write {parameter.name}: auto alone, or numbers")
    return problems


def _check_count(data: dict[str, Any], method: Method) -> list[str]:
    names, base = {str(entry.get("model")) for entry in _models(data)}, data.get("base_model")
    merged = names | ({str(base)} if base else set()) if method.base_is_a_model else names - {str(base)}
    if not merged or (method.needs_base and not base):
        return []
    counted = "the base included" if method.base_is_a_model else "not counting the base"
    problem = _count_problem(method, len(merged), counted)
    return [f"models: {problem}"] if problem else []


def _count_problem(method: Method, count: int, counted: str) -> str | None:
    low, high = method.experts
    if low <= count and (high is None or count <= high):
        return None
    wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    return f"{method.name} merges {wanted} model{'' if low == high == 1 else 's'}, {counted}; got {count}"


def _check_together(data: dict[str, Any], models: list[dict[str, Any]], method: Method) -> list[str]:
    """List the problems between parameters. Those with filters are checked later, when tensor names are known."""
    if method.check is None:
        return []
    experts = [(i, entry) for i, entry in enumerate(models) if str(entry.get("model")) != str(data.get("base_model"))]
    block, problems = data.get("lewis"), []
    for i, entry in experts:
        own, common = entry.get("parameters") or {}, data.get("parameters") or {}
        choices = {name: _constants(parameter, own, common) for name, parameter in method.parameters.items()}
        where = f"models[{i}].parameters" if own else "parameters"
        if block is not None and "density" in choices:
            where, choices["density"] = "lewis.density", _guided_densities(block)
        if sum(len(values) > 1 for values in choices.values()) > 1:
            continue  # two gradients: which of their values meet depends on the layer
        for values in itertools.product(*choices.values()):
            with method.blamed(where):
                problem = method.check(dict(zip(choices, values, strict=True)), len(experts))
            if problem:
                problems.append(f"{where}: {problem}")
    return problems


def _constants(parameter: Parameter, *blocks: dict[str, Any]) -> list[Any]:
    """The value of a parameter, or the smallest and largest of its gradient; empty if it has filters or is invalid."""
    raw = next((block[parameter.name] for block in blocks if parameter.name in block), parameter.default)
    try:
        rules = parse_setting(raw)
        if len(rules) != 1 or rules[0].filter not in (None, "*"):
            return []
        value = rules[0].value
        values = [parameter.parse(each) for each in (value if isinstance(value, tuple) else (value,))]
    except ValueError:
        return []  # reported elsewhere, with its place
    return sorted({min(values), max(values)})


def _guided_densities(block: dict[str, Any]) -> list[float]:
    """Return the smallest and the largest density that a `lewis` block allows; empty if the block is invalid."""
    density = _DEFAULTS | (block.get("density") or {})
    try:
        low, high = float(density["min"]), float(density["max"])
        if not _allocator(block).guides:
            low = high = float(density["budget"] or (low + high) / 2)
    except (TypeError, ValueError, OverflowError):
        return []  # the schema reports it
    return sorted({low, high})


def other_spellings(models: Mapping[str, str], base: str | None, root: Path) -> list[str]:
    """List the models that a recipe names twice in different spellings: by two paths, or two names of one Hub commit.

    Args:
        models: YAML path -> reference of a model, as the recipe writes it.
        base: reference of the base, as the recipe writes it.
        root: the folder that relative paths start from.
    """
    first = {_place(base, root): ("base_model", base)} if base is not None else {}
    problems = []
    for path, name in models.items():
        where, known = first.setdefault(_place(name, root), (path, name))
        if known != name:
            problems.append(f"{path}: {name!r} is {where} {known!r}, written in another way; give it once")
    return problems


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


def _check_models(data: dict[str, Any]) -> list[str]:
    problems, base = [], data.get("base_model")
    names = [str(entry.get("model")) for entry in _models(data)]
    for i, name in enumerate(names):
        if name in names[:i]:
            problems.append(f"models[{i}].model: {name!r} is listed twice; give it once, with the sum of the weights")
    if names and base is not None and set(names) == {str(base)}:
        problems.append("models: only the base is listed; add an expert")
    problems += _check_tokenizer(data, [str(base), *names])
    top_weight = "weight" in (data.get("parameters") or {})
    if data.get("merge_method") == "linear" and base is not None and str(base) not in names and not top_weight:
        problems.append(
            "base_model: it takes part in a linear merge: list it under models with a weight, or leave it out"
        )
    return problems


def _check_tokenizer(data: dict[str, Any], models: list[str]) -> list[str]:
    block, source = data.get("tokenizer"), data.get("tokenizer_source")
    sources = {"tokenizer_source": source, "tokenizer.source": (block or {}).get("source")}
    both = source is not None and block is not None
    problems = ["tokenizer: expected it or tokenizer_source, got both; remove one"] if both else []
    problems += [
        f"{where}: expected base, union or one of the models, got {given!r}"
        for where, given in sources.items()
        if isinstance(given, str) and given not in ("base", "union", *models)
    ]
    tokens = (block or {}).get("tokens")
    for token, own in tokens.items() if isinstance(tokens, dict) else ():
        row = own.get("source") if isinstance(own, dict) else None
        given = row.get("model") if isinstance(row, dict) else row
        if isinstance(given, str) and given not in models:
            problems.append(f"tokenizer.tokens.{token}.source: expected one of the models, got {given!r}")
    return problems


def _check_density(data: dict[str, Any]) -> list[str]:
    own = (data.get("lewis") or {}).get("density") or {}
    given = _DEFAULTS | own
    try:  # YAML reads 1e-1 as text
        low, high, budget = (None if given[key] is None else float(given[key]) for key in ("min", "max", "budget"))
    except (TypeError, ValueError, OverflowError):
        return []  # the schema reports it
    if low is None or high is None:
        return []
    if budget is not None and not _allocator(data.get("lewis")).guides:  # the default bounds do not apply to it
        low, high = (low if "min" in own else 0.0), (high if "max" in own else 1.0)
    if low > high:
        return [f"lewis.density.min: expected 0 < min <= max <= 1, got min={low}, max={high}"]
    if budget is not None and not low <= budget <= high:
        return [f"lewis.density.budget: expected min <= budget <= max, got min={low}, budget={budget}, max={high}"]
    return []


def _check_guided(data: dict[str, Any], method: Method) -> list[str]:
    """List the problems of a `lewis` block whose densities or `prune_by` the method cannot use."""
    if data.get("lewis") is not None and "density" not in method.parameters:
        trimming = [name for name, other in METHODS.items() if "density" in other.parameters]
        return [f"lewis: {method.name} takes no density to guide; use one of {', '.join(trimming)}"]
    if _prunes_by_activation(data) and not method.takes_scales:
        trimming = [name for name, other in METHODS.items() if other.takes_scales]
        wanted = f"expected magnitude, or one of {', '.join(trimming)}"
        return [f"lewis.prune_by: {method.name} does not trim by size; {wanted}"]
    return []


def _check_fit(data: dict[str, Any], method: Method) -> list[str]:
    """Problems of a method that fits: it needs calibration sets, and densities only where its anchor takes them."""
    block, own = data.get("lewis") or {}, anchor.method_of(data)
    given = [key for key in GUIDES if block.get(key) is not None]
    problems = []
    without_rows = method.fits == "static" and data.get("lewis") is None  # fits to the task vectors, its prior
    if not block.get("calibrations") and not without_rows:
        other = "leave lewis out" if method.fits == "static" else "take merge_method: regmean without it"
        problems.append(
            f"lewis.calibrations: missing; {method.name} fits the projections to the experts on calibration rows; add "
            'lewis: {calibrations: {NAME: {dataset: ..., prompt: "{question}", answer: "{answer}"}}}'
            f", or {other}, which fits to the task vectors alone"
        )
    if own is None or own.fits:
        why = f"{method.name} keeps whole task vectors and has no use for it; remove it, or let it guide an anchor"
        return problems + [f"lewis.{key}: {why}" for key in given]
    return problems + (_check_guided(data, own) if given else []) + _check_anchor(data, own, bool(given))


def _check_anchor(data: dict[str, Any], own: Method, guided: bool) -> list[str]:
    """List the problems of an anchor's method: with its parameters, and with the number of models that it takes."""
    block = data["anchor"]
    given = block.get("parameters") or {}
    inner = {**data, "parameters": given, "lewis": data.get("lewis") if guided else None}
    names = [entry.get("model") for entry in _models(data) if entry.get("model") != data.get("base_model")]
    problems = _check_parameters(inner, [], own.name)
    for parameter in own.parameters.values():
        if parameter.required and parameter.per_expert and parameter.name not in given:
            problems.append(f"parameters.{parameter.name}: missing; {own.name} needs it")
    problems += _check_together(inner, [{"model": name} for name in names], own)
    problems += _check_values("weight", block.get("weight", 1.0), anchor.WEIGHT)
    if names and (problem := _count_problem(own, len(names), "not counting the base")):
        problems.append(f"merge_method: {problem}")
    return [line if line.startswith("lewis.") else f"anchor.{line}" for line in problems]


def _allocator(block: dict[str, Any] | None) -> Allocator:
    """The allocator of a `lewis` block; the default one if the block names none, or an unknown one."""
    density = (block or {}).get("density") or {}
    return ALLOCATORS.get(str(density.get("strategy")), ALLOCATORS[DEFAULT])


def _prunes_by_activation(data: dict[str, Any]) -> bool:
    return (data.get("lewis") or {}).get("prune_by") == "activation"


def _check_guidance(data: dict[str, Any]) -> list[str]:
    """Keys of the lewis block that its strategy does not use, or that contradict its preset."""
    block = data.get("lewis") or {}
    density, metric = block.get("density") or {}, (block.get("importance") or {}).get("metric")
    allocator, problems = _allocator(data.get("lewis")), list(contradictions(block))
    for key in ("scale", "decimals"):
        if density.get(key) is not None and key not in allocator.uses:
            others = " or ".join(each.name for each in ALLOCATORS.values() if key in each.uses)
            problems.append(f"lewis.density.{key}: {allocator.name} has no use for it; leave it out, or use {others}")
    if metric is not None and allocator.evidence_by(str(metric)) != metric:
        others = " or ".join(each.name for each in ALLOCATORS.values() if each.evidence == "metric")
        problems.append(
            f"lewis.importance.metric: {allocator.name} has no use for {metric!r}; leave it out, or use {others}"
        )
    return problems


def _check_calibrations(data: dict[str, Any]) -> list[str]:
    """List the problems of calibration sets: models name sets that do not exist, or models that are run have none."""
    block, method = data.get("lewis"), METHODS.get(str(data.get("merge_method")))
    own, problems = block or {}, list[str]()
    names = list(map(str, own.get("calibrations") or {}))
    blind = _allocator(data.get("lewis")).evidence == "nothing"
    fits = method is not None and method.fits is not None  # `_check_fit` reports that
    runs_none = blind and own.get("aim") is None and not _prunes_by_activation(data) and not fits
    if own.get("hold_back") is not None and not fits:
        problems.append("lewis.hold_back: it judges a fit, and this method fits nothing; leave it out")
    elif own.get("hold_back") and not names:
        problems.append("lewis.hold_back: there are no calibration rows to hold back; give lewis.calibrations")
    if own.get("refine") is not None:
        if method is None or method.fits != "forward":
            problems.append("lewis.refine: only a fit in forward order is trained further; use regmean_forward")
        elif own.get("hold_back") is False:
            problems.append("lewis.refine: held-back rows decide when it ends; leave hold_back: false out")
    if block is not None and not names and not runs_none and not fits:
        problems.append("lewis.calibrations: LEWIS runs models on calibration rows and needs at least one set of them")
    for i, entry in enumerate(_models(data)):
        wanted, where = entry.get("calibration"), f"models[{i}].calibration"
        if wanted is None:
            if len(names) > 1 and not runs_none and str(entry.get("model")) != str(data.get("base_model")):
                expected = f"expected one of {', '.join(names)}"
                problems.append(f"{where}: missing, and there is more than one set; {expected}")
        elif block is None:
            problems.append(f"{where}: there is no lewis block that defines {wanted!r}")
        elif wanted not in names:
            problems.append(f"{where}: no calibration set {wanted!r}{nearest(str(wanted), names)}")
    return [*problems, *_check_continued(data, names), *_check_rows(data)]


def _check_rows(data: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for each set without a text, and for templates that are none or would turn all rows into one."""
    sets = (data.get("lewis") or {}).get("calibrations")
    for name, block in sets.items() if isinstance(sets, dict) else ():
        where, own = f"lewis.calibrations.{name}", block if isinstance(block, dict) else {}
        texts, fields = own.get("texts"), list[str]()
        if isinstance(texts, list) and not any(str(each).strip() for each in texts):
            yield f"{where}.texts: expected texts, got {'empty ones' if texts else 'none'}"
        given = {key: own[key] for key in ("text", "prompt", "answer") if own.get(key) and isinstance(own[key], str)}
        for key, template in given.items():
            try:
                fields += [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
            except ValueError as error:
                yield f"{where}.{key}: {template!r} is no template: {error}; write {{{{ for a brace"
                fields.append(template)
        if given and not fields:
            yield f'{where}.{key}: expected names of columns, such as "{{question}} {{answer}}", got {template!r}'


def _check_continued(data: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Yield a problem for each set with `continue`, unless exactly one expert names it: it writes the answers."""
    sets = (data.get("lewis") or {}).get("calibrations")
    experts = [each for each in _models(data) if str(each.get("model")) != str(data.get("base_model"))]
    for name, block in sets.items() if isinstance(sets, dict) else ():
        if not isinstance(block, dict) or block.get("continue") is None:
            continue
        writers = [str(each.get("model")) for each in experts if (each.get("calibration") or names[0]) == name]
        if len(writers) != 1:
            yield (
                f"lewis.calibrations.{name}.continue: expected one expert that names this set, and so writes its "
                f"answers, got {len(writers)}{': ' + ', '.join(writers) if writers else ''}; give each expert a set"
            )
