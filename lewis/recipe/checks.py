"""Checks that span several blocks of a recipe. They read the raw YAML, so that all problems are reported together."""

import itertools
from typing import Any

from lewis.allocators import ALLOCATORS, DEFAULT, Allocator
from lewis.errors import nearest
from lewis.methods import METHODS, Method, Parameter
from lewis.methods.registry import AUTO
from lewis.recipe import anchor, backends, slices
from lewis.recipe.presets import GUIDES, contradictions
from lewis.recipe.settings import parse_setting


def cross_check(data: dict[str, Any]) -> list[str]:
    """Problems that span blocks, each a line that begins with its YAML path.

    Args:
        data: the raw YAML. What is wrong within one block is left to the schema.
    """
    problems: list[str] = []
    method = METHODS.get(str(data.get("merge_method")))
    if data.get("merge_method") is not None and method is None:
        problems.append(
            f"merge_method: unknown method {data['merge_method']!r}{nearest(str(data['merge_method']), METHODS)}"
        )
    problems += anchor.problems_of(data, method) + backends.problems_of(data)
    if not data.get("slices"):
        return problems + _check_merge(data, method) + _check_blocks(data)
    problems += slices.problems_of(data, method)
    for i, each in slices.as_merges(data, method):
        problems += [slices.in_slice(data, i, problem) for problem in _check_merge(each, method)]
    whole = {**data, "models": slices.listed_models(data)}
    problems += _check_tokenizer(whole, [str(data.get("base_model")), *(each["model"] for each in whole["models"])])
    return problems + [slices.of_listed(data, problem) for problem in _check_blocks(whole)]


def _check_merge(data: dict[str, Any], method: Method | None) -> list[str]:
    """The method, its parameters and the models."""
    problems, models = list[str](), _models(data)
    if method is not None:
        problems += _check_parameters(data, models, method.name)
        if method.needs_base and not data.get("base_model"):
            what = "merges task vectors and" if method.on == "task_vectors" else "starts from a base and"
            problems.append(f"base_model: {method.name} {what} needs one")
        problems += _check_count(data, models, method)
        problems += _check_together(data, models, method)
        problems += _check_fit(data, models, method) if method.fits else _check_guided(data, method)
    return problems + _check_models(data, models)


def _models(data: dict[str, Any]) -> list[dict[str, Any]]:
    entries = data.get("models")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _check_blocks(data: dict[str, Any]) -> list[str]:
    """The blocks beside the merge."""
    problems, models = list[str](), _models(data)
    problems += _check_calibrations(data, models)
    problems += _check_density(data)
    problems += _check_guidance(data)
    if data.get("exclude") and not data.get("base_model"):
        problems.append("exclude: what is excluded is copied from the base; set base_model")
    output = data.get("output")
    if isinstance(output, dict) and output.get("kind") == "lora" and not data.get("base_model"):
        problems.append("output.kind: an adapter sits on a base; set base_model, or use full")
    register = data.get("register")
    if isinstance(register, dict) and register.get("gate") and not data.get("evaluate"):
        problems.append("register.gate: there is nothing to compare; add an evaluate block")
    if data.get("publish") and not register:
        problems.append("publish: what is published is the champion of a registered model; add a register block")
    return problems


def _check_parameters(data: dict[str, Any], models: list[dict[str, Any]], name: str) -> list[str]:
    known, problems = METHODS[name].parameters, []
    common = data.get("parameters")
    for parameter in known.values():
        given = isinstance(common, dict) and parameter.name in common
        if parameter.required and not given and not parameter.per_expert:
            problems.append(f"parameters.{parameter.name}: missing; {name} needs it")
        for i, entry in enumerate(models if parameter.required and not given and parameter.per_expert else ()):
            if parameter.name not in _block(entry.get("parameters")):
                problems.append(f"models[{i}].parameters.{parameter.name}: missing; {name} needs it")
    blocks = [(f"models[{i}].parameters", entry.get("parameters"), True) for i, entry in enumerate(models)]
    for where, block, of_expert in [*blocks, ("parameters", data.get("parameters"), False)]:
        for key, raw in _block(block).items():
            path = f"{where}.{key}"
            if key not in known:
                problems.append(f"{path}: {name} has no such parameter{nearest(str(key), known)}")
            elif of_expert and not known[key].per_expert:
                problems.append(f"{path}: {key} is one value for the whole merge; move it to parameters.{key}")
            else:
                problems += _check_values(path, raw, known[key].parse) or _check_auto(path, raw, known[key])
    return problems


def _check_auto(path: str, raw: Any, parameter: Parameter) -> list[str]:
    """`auto` is found for the whole merge: it is no part of a gradient, and has no filter."""
    try:
        rules = parse_setting(raw)
    except ValueError:
        return []  # the schema reports it, with its place
    values = [value for rule in rules for value in (rule.value if isinstance(rule.value, tuple) else (rule.value,))]
    if not parameter.auto or AUTO not in values or raw == AUTO:
        return []
    return [f"{path}: auto is found for the whole merge; write {parameter.name}: auto alone, or numbers"]


def _block(value: Any) -> dict[Any, Any]:
    """A block of the recipe; empty if it is missing or none, which the schema reports."""
    return value if isinstance(value, dict) else {}


def _check_values(path: str, raw: Any, parse: Any) -> list[str]:
    try:
        rules = parse_setting(raw)
    except ValueError:
        return []  # the schema reports it, with its place
    problems = []
    for rule in rules:
        for value in rule.value if isinstance(rule.value, tuple) else (rule.value,):
            try:
                parse(value)
            except ValueError as error:
                problems.append(f"{path}: {error}")
    return problems


def _check_count(data: dict[str, Any], models: list[dict[str, Any]], method: Method) -> list[str]:
    names = {str(entry.get("model")) for entry in models}
    base = data.get("base_model")
    beside = names | ({str(base)} if base else set()) if method.base_is_a_model else names - {str(base)}
    if not beside or (method.needs_base and not base):
        return []
    counted = "the base included" if method.base_is_a_model else "not counting the base"
    problem = _count_problem(method, len(beside), counted)
    return [f"models: {problem}"] if problem else []


def _count_problem(method: Method, count: int, counted: str) -> str | None:
    low, high = method.experts
    if low <= count and (high is None or count <= high):
        return None
    wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    return f"{method.name} merges {wanted} model{'' if low == high == 1 else 's'}, {counted}; got {count}"


def _check_together(data: dict[str, Any], models: list[dict[str, Any]], method: Method) -> list[str]:
    """Parameters that must fit together. Those with filters are checked later, when the tensors' names are known."""
    experts = [(i, entry) for i, entry in enumerate(models) if str(entry.get("model")) != str(data.get("base_model"))]
    block, problems = data.get("lewis"), []
    for i, entry in experts if method.check else ():
        own, common = entry.get("parameters"), data.get("parameters")
        choices = {name: _constants(parameter, own, common) for name, parameter in method.parameters.items()}
        where = f"models[{i}].parameters" if own else "parameters"
        if isinstance(block, dict) and "density" in choices:
            where, choices["density"] = "lewis.density", _guided_densities(block)
        if sum(len(values) > 1 for values in choices.values()) > 1:
            continue  # two gradients: which of their values meet depends on the layer
        for values in itertools.product(*choices.values()):
            with method.blamed(where):
                problem = method.check(dict(zip(choices, values, strict=True)), len(experts)) if method.check else None
            if problem:
                problems.append(f"{where}: {problem}")
    return problems


def _constants(parameter: Parameter, *blocks: Any) -> list[Any]:
    """The value of a parameter, or the smallest and largest of its gradient; empty if it has filters or is invalid."""
    raw = next((b[parameter.name] for b in blocks if isinstance(b, dict) and parameter.name in b), parameter.default)
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
    """The smallest and the largest density that LEWIS may give; empty if the block is invalid."""
    found = block.get("density")
    density: dict[str, Any] = found if isinstance(found, dict) else {}
    try:
        low, high = (float(density.get(key, default)) for key, default in (("min", 0.3), ("max", 0.8)))
        if not _allocator(block).guides:
            low = high = float(density.get("budget") or (low + high) / 2)
    except (TypeError, ValueError, OverflowError):
        return []  # the schema reports it
    return sorted({low, high})


def _check_models(data: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    problems, base = [], data.get("base_model")
    names = [str(entry.get("model")) for entry in models]
    seen = set()
    for i, name in enumerate(names):
        if name in seen:
            problems.append(f"models[{i}].model: {name!r} is listed twice; give it once, with the sum of the weights")
        seen.add(name)
    if models and base is not None and all(name == str(base) for name in names):
        problems.append("models: only the base is listed; add an expert")
    problems += _check_tokenizer(data, [str(base), *names])
    top_weight = isinstance(data.get("parameters"), dict) and "weight" in data["parameters"]
    if data.get("merge_method") == "linear" and base is not None and str(base) not in names and not top_weight:
        problems.append(
            "base_model: it takes part in a linear merge: list it under models with a weight, or leave it out"
        )
    return problems


def _check_tokenizer(data: dict[str, Any], models: list[str]) -> list[str]:
    sources, block = {"tokenizer_source": data.get("tokenizer_source")}, data.get("tokenizer")
    problems = []
    if isinstance(block, dict):
        sources["tokenizer.source"] = block.get("source")
    if sources["tokenizer_source"] is not None and block is not None:
        problems.append("tokenizer: expected it or tokenizer_source, got both; remove one")
    return problems + [
        f"{where}: expected base, union or one of the models, got {source!r}"
        for where, source in sources.items()
        if isinstance(source, str) and source not in ("base", "union", *models)
    ]


def _check_density(data: dict[str, Any]) -> list[str]:
    block = data.get("lewis")
    density = block.get("density") if isinstance(block, dict) else None
    own: dict[str, Any] = density if isinstance(density, dict) else {}
    given = {"min": 0.3, "max": 0.8, "budget": None} | own
    try:  # YAML reads 1e-1 as text
        low, high, budget = (None if given[key] is None else float(given[key]) for key in ("min", "max", "budget"))
    except (TypeError, ValueError, OverflowError):
        return []  # the schema reports it
    if low is None or high is None:
        return []  # the schema reports it
    if low > high:
        return [f"lewis.density.min: expected 0 < min <= max <= 1, got min={low}, max={high}"]
    if not _allocator(block).guides:  # the default bounds do not apply to one density for all
        low, high = (low if "min" in own else 0.0), (high if "max" in own else 1.0)
    if budget is not None and not low <= budget <= high:
        return [f"lewis.density.budget: expected min <= budget <= max, got min={low}, budget={budget}, max={high}"]
    return []


def _check_guided(data: dict[str, Any], method: Method) -> list[str]:
    """Whether a method takes the densities that the `lewis` block decides."""
    if data.get("lewis") is not None and "density" not in method.parameters:
        trimming = [name for name, other in METHODS.items() if "density" in other.parameters]
        return [f"lewis: {method.name} takes no density to guide; use one of {', '.join(trimming)}"]
    if _prunes_by_activation(data) and not method.takes_scales:
        trimming = [name for name, other in METHODS.items() if other.takes_scales]
        wanted = f"expected magnitude, or one of {', '.join(trimming)}"
        return [f"lewis.prune_by: {method.name} does not trim by size; {wanted}"]
    return []


def _check_fit(data: dict[str, Any], models: list[dict[str, Any]], method: Method) -> list[str]:
    """A method that fits needs calibration sets. What decides densities is of use only to its anchor."""
    block, own = data.get("lewis"), anchor.method_of(data)
    given = [key for key in GUIDES if _is_given(block, key)]
    problems = []
    if block is None or (isinstance(block, dict) and not block.get("calibrations")):
        problems.append(
            f"lewis.calibrations: missing; {method.name} fits the projections to the experts on calibration rows; add "
            'lewis: {calibrations: {NAME: {dataset: ..., text: "{question} {answer}"}}}'
        )
    if own is None or own.fits:
        why = f"{method.name} keeps whole task vectors and has no use for it; remove it, or let it guide an anchor"
        return problems + [f"lewis.{key}: {why}" for key in given]
    return problems + (_check_guided(data, own) if given else []) + _check_anchor(data, models, own, bool(given))


def _check_anchor(data: dict[str, Any], models: list[dict[str, Any]], own: Method, guided: bool) -> list[str]:
    """The parameters of the anchor's method, and how many models it merges."""
    block = data["anchor"]
    given = block.get("parameters")
    inner = {**data, "parameters": given, "lewis": data.get("lewis") if guided else None}
    experts = [{"model": entry.get("model")} for entry in models if entry.get("model") != data.get("base_model")]
    problems = _check_parameters(inner, [], own.name)
    for parameter in own.parameters.values():
        if parameter.required and parameter.per_expert and not (isinstance(given, dict) and parameter.name in given):
            problems.append(f"parameters.{parameter.name}: missing; {own.name} needs it")
    problems += _check_together(inner, experts, own)
    problems += _check_values("weight", block.get("weight", 1.0), anchor.WEIGHT.parse)
    if experts and (problem := _count_problem(own, len(experts), "not counting the base")):
        problems.append(f"merge_method: {problem}")
    return [line if line.startswith("lewis.") else f"anchor.{line}" for line in problems]


def _is_given(block: Any, key: str) -> bool:
    return isinstance(block, dict) and block.get(key) is not None


def _allocator(block: Any) -> Allocator:
    """The allocator of a `lewis` block: the default's, if it names none or one that there is not."""
    density = _block(_block(block).get("density"))
    return ALLOCATORS.get(str(density.get("strategy")), ALLOCATORS[DEFAULT])


def _prunes_by_activation(data: dict[str, Any]) -> bool:
    block = data.get("lewis")
    return isinstance(block, dict) and block.get("prune_by") == "activation"


def _check_guidance(data: dict[str, Any]) -> list[str]:
    """Keys of the lewis block that its strategy does not use, or that contradict its preset."""
    block = data.get("lewis")
    if not isinstance(block, dict):
        return []
    density, importance = ({} if not isinstance(block.get(k), dict) else block[k] for k in ("density", "importance"))
    allocator, problems = _allocator(block), list(contradictions(block))
    for key in ("scale", "decimals"):
        if density.get(key) is not None and key not in allocator.uses:
            others = " or ".join(each.name for each in ALLOCATORS.values() if key in each.uses)
            problems.append(f"lewis.density.{key}: {allocator.name} has no use for it; leave it out, or use {others}")
    metric = importance.get("metric")
    if metric is not None and allocator.evidence_by(str(metric)) != metric:
        others = " or ".join(each.name for each in ALLOCATORS.values() if each.evidence == "metric")
        problems.append(
            f"lewis.importance.metric: {allocator.name} has no use for {metric!r}; leave it out, or use {others}"
        )
    return problems


def _check_calibrations(data: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    block = data.get("lewis")
    sets = block.get("calibrations") if isinstance(block, dict) else None
    names = list(map(str, sets)) if isinstance(sets, dict) else []
    problems = []
    blind = _allocator(block).evidence == "nothing"
    holds_back = isinstance(block, dict) and block.get("aim") is not None
    method = METHODS.get(str(data.get("merge_method")))
    fits = method is not None and method.fits is not None  # `_check_fit` tells it
    uniform = blind and not holds_back and not _prunes_by_activation(data) and not fits
    if isinstance(block, dict) and not names and not uniform and not fits:
        problems.append("lewis.calibrations: LEWIS runs models on calibration rows and needs at least one set of them")
    base = str(data.get("base_model"))
    for i, entry in enumerate(models):
        wanted, where = entry.get("calibration"), f"models[{i}].calibration"
        if wanted is not None and block is None:
            problems.append(f"{where}: there is no lewis block that defines {wanted!r}")
        elif wanted is not None and wanted not in names and isinstance(block, dict):
            problems.append(f"{where}: no calibration set {wanted!r}{nearest(str(wanted), names)}")
        elif wanted is None and len(names) > 1 and not uniform and str(entry.get("model")) != base:
            problems.append(f"{where}: missing, and there is more than one set; expected one of {', '.join(names)}")
    return problems
