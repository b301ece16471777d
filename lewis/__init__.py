"""LEWIS (LayEr WIse Sparsity, arXiv 2503.03874) merging as a library: no Prefect, no network at import.

    import lewis

    merged = lewis.merge("recipe.yaml", "merged")
    print(merged.card)

Each function takes a recipe: a YAML file, or a `lewis.Recipe`. Their modules are imported at their first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "allocate", "inspect", "measure", "merge", "plan", "score"]

if TYPE_CHECKING:
    from lewis.library import allocate, inspect, measure, merge, plan, score
    from lewis.recipe.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from lewis.recipe.recipe import Recipe

        return Recipe
    if name in __all__:
        from lewis import library

        return getattr(library, name)
    raise AttributeError(f"module 'lewis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
