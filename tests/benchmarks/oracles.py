"""Merge methods by their authors' own code, on the models, calibration rows and test rows of `remedies run`.

    python -m tests.benchmarks.oracles FILE.jsonl NAME METHOD [VALUE] --rows DIR --base DIR --expert TASK=DIR ...

METHOD is `regmean++` (VALUE: the factor of what is off the diagonal, theirs is 0.95) or `wudi` (VALUE: steps, theirs
are 400) of FusionBench 0.2.33 (`pip install fusion-bench`), or `featcal` (VALUE: the factor of the task arithmetic that
it starts from, theirs is 0.3), whose `src` is then on PYTHONPATH (the repository egangu/featcal). Those repositories
have them for other architectures: here are only the parts that know Llama, and the authors' values. FILE is one
that `remedies table` prints. All calibration rows are used, where our fit holds a quarter back.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lewis.importance.calibration import Calibration
from lewis.models.model import Model
from tests.benchmarks import remedies
from tests.benchmarks.quality import Scorer
from tests.support import pipeline

Rows = dict[str, list[list[int]]]
"""Task -> calibration rows as token ids."""


class InMemory:
    """A network's weights, read like a checkpoint."""

    def __init__(self, network: nn.Module) -> None:
        self.tensors = dict(network.named_parameters())

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def load(base: Path, model: Model | None = None) -> nn.Module:
    """The base as a network, or with the weights of another model."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    parameters = dict(network.named_parameters())
    for name in model.tensors if model else ():
        parameters[name].copy_(model.read(name))
    return network


def run_layer(network: nn.Module, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a decoder layer gives for one row."""
    positions = network.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    found = layer(hidden, position_embeddings=positions, attention_mask=None)
    return found[0] if isinstance(found, tuple) else found


def observe(network: nn.Module, layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a decoder layer gives for one row, and the inputs of each linear module in it: (tokens, features)."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, given: found.update({name: given[0].reshape(-1, given[0].shape[-1])})

    linear = {name: each for name, each in layer.named_modules() if isinstance(each, nn.Linear)}
    hooks = [each.register_forward_pre_hook(keep(name)) for name, each in linear.items()]
    output = run_layer(network, layer, hidden)
    for hook in hooks:
        hook.remove()
    return output, found


def regmean_plus_plus(base: nn.Module, experts: dict[str, nn.Module], rows: Rows, value: float) -> nn.Module:
    from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
    from fusion_bench.modelpool import BaseModelPool

    class Pool(BaseModelPool):
        def __init__(self) -> None:
            pass

        def named_models(self) -> Any:
            return experts.items()

        def load_pretrained_model(self, *_: Any, **__: Any) -> nn.Module:
            return base

        def load_train_dataset(self, name: str, *_: Any, **__: Any) -> list[list[int]]:
            return rows[name]

    class ForLlama(RegMeanAlgorithmPlusPlus):
        def merge_embedding_layer(self, models_to_merge_dict: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
            name = "model.embed_tokens.weight"
            return {name: torch.stack([each.get_parameter(name) for each in models_to_merge_dict.values()]).mean(0)}

        def get_input_for_first_layer(self, model: nn.Module, train_dataset: list[list[int]]) -> list[torch.Tensor]:
            return [model.model.embed_tokens(torch.tensor([row])) for row in train_dataset]

        def get_layers(self, model: nn.Module) -> nn.ModuleList:
            return model.model.layers

        def update_merged_params_dict(self, merged_params_dict: Any, new_merged_params: Any, layer_idx: int) -> Any:
            return {
                **merged_params_dict,
                **{f"model.layers.{layer_idx}.{name}": each for name, each in new_merged_params.items()},
            }

        def layer_batches_forward(self, layer: nn.Module, batches_input: list[torch.Tensor]) -> list[torch.Tensor]:
            return [run_layer(base, layer, hidden) for hidden in batches_input]

        def get_regmean_weights(
            self, model_name: str, layer: nn.Module, batches_input: list[torch.Tensor], linear_modules_to_merge: Any
        ) -> dict[str, torch.Tensor]:
            sums, tokens = dict[str, Any](), sum(hidden.shape[1] for hidden in batches_input)
            for hidden in batches_input:
                for name, given in observe(base, layer, hidden)[1].items():
                    sums[name] = sums.get(name, 0) + given.T @ given
            return {name: each / tokens for name, each in sums.items()}

    values = {"num_regmean_examples": 0, "exclude_param_names_regex": [], "weight_transpose": True}
    return ForLlama(reduce_non_diagonal_ratio=value, **values).run(Pool())


def wudi(base: nn.Module, experts: dict[str, nn.Module], rows: Rows, value: float) -> nn.Module:
    from fusion_bench.method.wudi.wudi import wudi_merging

    own = base.state_dict()
    moved = [name for name in own if "layers" in name]  # adapters leave the embedding and the head as they are
    vectors = [{name: each.state_dict()[name] - own[name] for name in moved} for each in experts.values()]
    with torch.enable_grad():
        merged = wudi_merging(vectors, accelerator="cpu", iter_num=int(value))
    base.load_state_dict({name: own[name] + each.detach() for name, each in merged.items()}, strict=False)
    return base


def featcal(base: nn.Module, experts: dict[str, nn.Module], rows: Rows, value: float) -> nn.Module:
    from featcal.solver import featcal_merge_linear_weight

    teacher, values = 0.25, {"ridge_lambda": 0.05, "anchor_blend_rho": 2.2}  # as the authors have them
    own = {name: each.clone() for name, each in base.state_dict().items()}
    for name in own:
        base.state_dict()[name].add_(sum(each.state_dict()[name] - own[name] for each in experts.values()), alpha=value)
    hidden = {task: [base.model.embed_tokens(torch.tensor([row])) for row in each] for task, each in rows.items()}
    theirs = dict(hidden)
    for number, layer in enumerate(base.model.layers):
        statistics = []
        for task, expert in experts.items():
            of_expert, sums, outputs = expert.model.layers[number], dict[str, Any](), []
            for mine, other in zip(hidden[task], theirs[task], strict=True):
                output, given = observe(base, of_expert, other)
                outputs.append(output)
                for name, x in observe(base, layer, mine)[1].items():
                    target = teacher * given[name] + (1 - teacher) * x
                    for kind, each in (("cov_ss", x.T @ x), ("cross_st", x.T @ target)):
                        sums.setdefault(name, {}).setdefault(kind, torch.zeros_like(each)).add_(each)
            tokens = sum(map(len, rows[task]))
            statistics.append({name: {kind: x / tokens for kind, x in each.items()} for name, each in sums.items()})
            theirs[task] = outputs
        for name in statistics[0]:
            weights = [each.model.layers[number].get_submodule(name).weight for each in experts.values()]
            mine = layer.get_submodule(name).weight
            of_base = own[f"model.layers.{number}.{name}.weight"]
            found = [each[name] for each in statistics]
            mine.copy_(featcal_merge_linear_weight(weights, found, merged_param=mine, base_param=of_base, **values))
        hidden = {task: [run_layer(base, layer, each) for each in of_task] for task, of_task in hidden.items()}
    return base


METHODS = {"regmean++": (regmean_plus_plus, 0.95), "wudi": (wudi, 400.0), "featcal": (featcal, 0.3)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Merge by the authors' code, and score the merged model and the experts."""
    method, default = METHODS[options.method]
    experts = dict(each.split("=", 1) for each in options.expert)
    recipe = remedies.recipe_of(options, experts, [])
    pinned, sources = pipeline.pin_all(recipe)
    assert pinned is not None and recipe.lewis is not None
    base, files = pipeline.download(pinned), [pipeline.download(source) for source in sources]
    scorer = Scorer(options.base, remedies.test_rows(options, experts, options.skip, options.count), torch.float32)
    own = remedies.of_experts(experts, recipe, scorer)
    sets = {task: Calibration.load(pipeline.prepare_calibration(recipe, task, base).path) for task in experts}
    rows = {task: list(map(list, each.samples)) for task, each in sets.items()}
    networks = {task: load(options.base, each.open()) for task, each in zip(experts, files, strict=True)}
    begun = time.perf_counter()
    merged = method(load(options.base), networks, rows, default if options.value is None else options.value)
    seconds = round(time.perf_counter() - begun)
    found = {"losses": scorer.losses(InMemory(merged)), "fit": "", "seconds": seconds}
    return remedies.line(options.name, options, found, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("value", type=float, nargs="?")
    remedies.add_options(parser)
    options = parser.parse_args()
    with torch.no_grad():
        found = run(options)
    with options.file.open("a") as file:
        file.write(json.dumps(found) + "\n")
    remedies.print_table([found])


if __name__ == "__main__":
    main()
