"""Keys of mergekit's configs that a recipe spells differently: translated, or refused with what to do instead."""

from collections.abc import Mapping
from typing import Any

from lewis.errors import RecipeError

OTHERS = {  # key that only a config of another of mergekit's programs has -> what it is, and what to do
    "genome": "this is a config of mergekit-evolve, which searches for parameters; write a recipe with the models, an "
    "`evaluate` block and a `search` block, and run lewis search",
    "layer_slices": "this is a config of bakllama, the forerunner of mergekit's passthrough; write `merge_method: "
    "passthrough` and `slices`",
    "gate_mode": "this is a config of mergekit-moe, which builds a mixture of experts of dense models; LEWIS merges "
    "models of one architecture: build it with mergekit-moe, and merge what was built, or merge the dense models here",
    "metric_method": "this is a config that compares models and merges none; list them in a recipe, and run lewis "
    "inspect",
    "out_path": "this is a config of mergekit-mega; write `name` for `out_path`, and let later documents use the name "
    "as a model",
}


def as_recipe(data: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a mergekit config into a recipe: replace `random_seed` and `modules`, and drop `name`.

    Raises:
        RecipeError: if it is the config of another program, has several modules, or has malformed or conflicting keys.
    """
    found = dict(data)
    experts = found.get("experts")
    if "merge_method" not in found and isinstance(experts, list):
        found.setdefault("gate_mode", "hidden")
    for key, what in OTHERS.items():
        if key in found:
            where = "experts" if key == "gate_mode" and "gate_mode" not in data else key
            raise RecipeError(f"{where}: {what}")
    if "random_seed" in found:
        seed = found.pop("random_seed")
        if found.setdefault("seed", seed) != seed:
            raise RecipeError(f"random_seed: expected it or seed, got {seed!r} and {found['seed']!r}; remove one")
    if "name" in found and (not isinstance(found["name"], str) or not found.pop("name")):
        raise RecipeError(f"name: expected a text, by which later documents of the file call this one's result, got "
                          f"{data['name']!r}")  # fmt: skip
    if found.get("modules") is not None:
        found = _of_module(found)
    if found.get("slices") and not found.get("models"):
        found.pop("models", None)
    return found


def _of_module(data: dict[str, Any]) -> dict[str, Any]:
    """Replace `modules` by the content of its only module."""
    modules = data.pop("modules")
    if not isinstance(modules, dict) or not all(isinstance(each, dict) for each in modules.values()):
        raise RecipeError(f"modules: expected a mapping from a name to `models` or `slices`, got {modules!r}")
    if len(modules) != 1:
        raise RecipeError(
            f"modules: expected one, got {', '.join(map(str, modules)) or 'none'}; a merge takes all tensors of a "
            "model: list its models once, and give each part its own values by filters, or leave it out by `exclude`"
        )
    [(name, content)] = modules.items()
    if unknown := sorted(map(str, content.keys() - {"models", "slices", "parameters"})):
        raise RecipeError(f"modules.{name}.{unknown[0]}: expected models, slices or parameters")
    for key in ("models", "slices"):
        if content.get(key) and data.get(key):
            raise RecipeError(f"modules.{name}.{key}: expected it or {key}, got both; remove one")
        if content.get(key):
            data[key] = content[key]
    own, common = content.get("parameters") or {}, data.get("parameters") or {}
    if isinstance(own, dict) and isinstance(common, dict) and own:
        data["parameters"] = {**common, **{key: _before(value, common.get(key)) for key, value in own.items()}}
    return data


def _before(own: Any, common: Any) -> Any:
    """Append the common setting to a module's list of filters: it applies where no filter matches."""
    if common is None or not (isinstance(own, list) and own and all(isinstance(rule, dict) for rule in own)):
        return own
    rules = common if isinstance(common, list) and all(isinstance(rule, dict) for rule in common) else None
    return [*own, *(rules if rules is not None else [common if isinstance(common, dict) else {"value": common}])]
