"""A recipe and variants of it side by side, on the half of the documents that a search confirms on.

    python -m tests.benchmarks.variants RECIPE [--set PATH=VALUE ...] --variant NAME PATH=VALUE ... [--variant ...]

What a search has scored with the same settings (`LEWIS_HOME`) is found.
"""

import argparse
import sys

from lewis.evaluation.statistics.scored import Scored, gain
from lewis.evaluation.step import EvalSettings, scored_models
from lewis.recipe.recipe import Recipe
from lewis.reports.markdown import markdown_table
from lewis.search import study, trial
from lewis.steps.graph import graph
from tests.support import pipeline


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE", help="for all")
    parser.add_argument("--variant", action="append", nargs="+", default=[], metavar="NAME PATH=VALUE")
    options = parser.parse_args(arguments)
    common = [*options.overrides, "evaluate.documents=confirm"]
    plan = Recipe.load(options.recipe, common)
    models = [score("default", plan)]
    for name, *overrides in options.variant:
        models.append(score(name, Recipe.load(options.recipe, [*common, *overrides])))
    print(markdown_table([row(model, models[0], study.objectives_of(plan)[0]) for model in models]))


def score(name: str, recipe: Recipe) -> Scored:
    base_source, sources = pipeline.pin_all(recipe)
    base = pipeline.download(base_source) if base_source else None
    experts = [pipeline.download(source) for source in sources]
    assert recipe.evaluate is not None
    known = pipeline.known(recipe, base, experts)
    entry = trial.score_trial(graph(recipe), "merged", known, EvalSettings.of(recipe.evaluate, recipe.root))
    print(f"{name}: scored", file=sys.stderr)
    return scored_models(recipe.score_weights, {name: entry})[0]


def row(model: Scored, default: Scored, metric: str) -> dict[str, str]:
    cells = {"model": model.label}
    cells |= {f"{key} {'↑' if s.higher_is_better else '↓'}": f"{s.value:.4f}" for key, s in model.by_name.items()}
    found = None if model is default else gain(model, default, metric)
    told = f"{found.delta:+.4f} ({found.low:+.4f} to {found.high:+.4f})" if found else ""
    return {**cells, f"gain on the default, {metric}": told, "p": f"{found.p:.2g}" if found else ""}


if __name__ == "__main__":
    main(sys.argv[1:])
