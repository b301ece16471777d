"""Recipes as mergekit configs, and mergekit itself as the oracle: the same tensors from the same YAML."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lewis.allocation.densities import Allocation
from lewis.errors import InputError
from lewis.merging.export import check_exportable, to_mergekit
from lewis.models.checkpoint import Checkpoint
from lewis.models.hub.pin import Pinned
from lewis.models.source import Source
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import parse

MERGEKIT = os.environ.get("LEWIS_MERGEKIT")
needs_mergekit = pytest.mark.skipif(not MERGEKIT, reason="LEWIS_MERGEKIT names no python that has mergekit")
SETS = {"sums": {"texts": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"], "samples": 3}}
UP = "model.layers.0.mlp.up_proj.weight"


def source(ref: str, name: str, commit: str, adapter: Pinned | None = None) -> Source:
    return Source(ref, Pinned(ref, name, commit, 1), adapter)


BASE = source("org/base", "org/base", "b" * 40)
MATH = source("org/math@v1", "org/math", "1" * 40)


def exported(data: dict[str, Any], *allocated: Allocation, experts: list[Source] | None = None) -> dict[str, Any]:
    recipe = parse({"merge_method": "ties", "base_model": "org/base", "models": [{"model": "org/math@v1"}]} | data)
    allocations = dict(zip([entry.model for entry in recipe.experts], allocated, strict=False))
    found: dict[str, Any] = yaml.safe_load(
        to_mergekit(recipe.text, recipe, recipe.lewis, BASE, experts or [MATH], allocations)
    )
    return found


class TestConfig:
    def test_models_are_named_by_commit_and_our_blocks_left_out(self) -> None:
        lewis = {"calibrations": {"s": {"texts": ["a"]}}}
        models = [{"model": "org/base"}, {"model": "org/math@v1", "calibration": "s", "parameters": {"weight": 0.5}}]
        data = {
            "models": models,
            "lewis": lewis,
            "seed": 3,
            "evaluate": {"tasks": ["x"]},
            "tokenizer_source": "org/math@v1",
        }
        data |= {"register": {"name": "x"}, "dtype": "float32", "publish": {"repo": "org/x"}}
        data |= {"inspect": {"on": "warn"}, "serve": {"kind": "webhook", "url": "http://10.0.0.1/hook"}}
        data |= {"search": {"space": {"parameters.lambda": [1, 2]}, "metrics": ["x/acc,none"]}}
        assert exported(data, Allocation({"a.b": 0.25, "a.b.c": 0.5, "z": 1.0}, 0.5, {})) == {
            "merge_method": "ties",
            "base_model": f"org/base@{'b' * 40}",
            "models": [
                {"model": f"org/base@{'b' * 40}"},
                {
                    "model": f"org/math@{'1' * 40}",
                    "parameters": {
                        "weight": 0.5,
                        "density": [  # the longer first: mergekit takes the first filter that is a part of the name
                            {"filter": "a.b.c", "value": 0.5},
                            {"filter": "a.b", "value": 0.25},
                            {"filter": "z", "value": 1.0},
                        ],
                    },
                },
            ],
            "tokenizer_source": f"org/math@{'1' * 40}",
            "dtype": "float32",
        }

    def test_models_whose_tokens_the_result_has_are_named_by_commit(self) -> None:
        math, pinned = {"model": {"path": "org/math", "revision": "v1"}}, f"org/math@{'1' * 40}"
        assert exported({"tokenizer_source": math})["tokenizer_source"] == pinned
        zero, row = {"kind": "zero"}, {"kind": "model_token", "model": "org/math@v1", "token_id": 3}
        sources = {"<a>": "org/math@v1", "<b>": math, "<c>": row, "<d>": zero, "<e>": "org/base"}
        tokens = {token: {"source": source} for token, source in sources.items()} | {"<f>": {"force": True}}
        assert exported({"tokenizer": {"source": "union", "tokens": tokens}})["tokenizer"] == {
            "source": "union",
            "tokens": {
                "<a>": {"source": pinned},
                "<b>": {"source": pinned},
                "<c>": {"source": {**row, "model": pinned}},
                "<d>": {"source": zero},
                "<e>": {"source": f"org/base@{'b' * 40}"},
                "<f>": {"force": True},
            },
        }

    @pytest.mark.parametrize(
        "own, common, rest",
        [
            ({}, {}, [{"value": 1.0}]),
            ({"weight": [0, 1]}, {"weight": 5}, [{"value": [0, 1]}]),
            ({}, {"weight": 5}, [{"value": 5}]),
            ({"weight": {"filter": "mlp", "value": 2}}, {}, [{"filter": "mlp", "value": 2}]),
            ({"weight": [{"filter": "mlp", "value": 2}]}, {"weight": 5}, [{"filter": "mlp", "value": 2}]),
        ],
    )
    def test_density_0_becomes_weight_0(self, own: dict[str, Any], common: dict[str, Any], rest: list[Any]) -> None:
        models = [{"model": "org/math@v1", "parameters": own}]
        found = exported({"models": models, "parameters": common}, Allocation({"norm": 0.0, UP: 0.5}, 0.5, {}))
        assert found["models"][0]["parameters"] == {
            "density": [{"filter": UP, "value": 0.5}],
            "weight": [{"filter": "norm", "value": 0.0}, *rest],
        }

    @pytest.mark.parametrize("method", ["pcb", "consensus"])
    def test_a_method_that_mergekit_does_not_know(self, method: str) -> None:
        models = [{"model": "org/math@v1"}, {"model": "org/code"}]
        with pytest.raises(InputError, match=f"merge_method: mergekit has no method '{method}'"):
            exported({"merge_method": method, "models": models}, experts=[MATH, MATH])

    def test_adapters_and_folders(self) -> None:
        folder = source("./math", "/models/math", "sha256:" + "2" * 64)
        adapter = source("org/math@v1", "org/base", "b" * 40, Pinned("org/math@v1", "org/lora", "3" * 40, 1))
        names = [
            m["model"]
            for m in exported({"models": [{"model": "./math"}, {"model": "org/math@v1"}]}, experts=[folder, adapter])[
                "models"
            ]
        ]
        assert names == ["/models/math", f"org/base@{'b' * 40}+org/lora@{'3' * 40}"]

    def test_a_folder_with_the_sign_of_a_revision(self) -> None:
        folder = source("./math", "/models/math@v1", "sha256:" + "2" * 64)
        with pytest.raises(InputError, match=r"/models/math@v1: mergekit takes an @ in a name .* rename the folder"):
            exported({"models": [{"model": "./math"}]}, experts=[folder])


def mergekit(config: str, folder: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of a config, run in its own environment."""
    folder.mkdir()
    (folder / "config.yml").write_text(config)
    command = [str(Path(str(MERGEKIT)).parent / "mergekit-yaml"), str(folder / "config.yml"), str(folder / "out")]
    command += ["--quiet", "--lora-merge-cache", str(folder / "lora"), "--lora-merge-dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {name: t for path in (folder / "out").glob("*.safetensors") for name, t in load_file(path).items()}


def plain(family: Family, method: str, experts: list[Path], own: list[Any], **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": each} for path, each in zip(experts, own, strict=True)]
    data = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    return data if method == "linear" else data | {"base_model": str(family.base)}


def test_a_gguf_file_is_not_exported_as_the_folder_that_was_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "gguf.json").write_text("{}")
    with pytest.raises(InputError, match=r"org/math@v1: mergekit reads no GGUF file; use the model's safetensors"):
        exported({}, experts=[source("org/math@v1", str(tmp_path), "sha256:" + "1" * 64)])


def test_pruning_by_activation_cannot_be_written(family: Family) -> None:
    lewis = {"calibrations": {"sums": SETS["sums"]}, "prune_by": "activation"}
    recipe = parse(plain(family, "ties", family.experts, [{}, {}]) | {"lewis": lewis})
    with pytest.raises(InputError, match=r"lewis.prune_by: mergekit keeps elements by magnitude"):
        to_mergekit(recipe.text, recipe, recipe.lewis, None, [], {})


@needs_mergekit
@pytest.mark.timeout(400)
class TestOracle:
    def check(self, data: dict[str, Any], folder: Path) -> None:
        recipe = parse(data, root=folder)
        base, experts = pipeline.pin_all(recipe)
        files, experts_files = pipeline.download(base) if base else None, [pipeline.download(s) for s in experts]
        allocated = None
        if recipe.lewis:
            assert files is not None
            _, allocated = pipeline.guide(recipe, files, experts_files)
        merged = pipeline.merge(recipe, files, experts_files, allocated)
        ours = Checkpoint(merged.folder, merged.digest)
        theirs = mergekit(
            to_mergekit(recipe.text, recipe, recipe.lewis, base, experts, allocated.experts() if allocated else {}),
            folder / "mergekit",
        )
        assert theirs.keys() - ours.tied.keys() == ours.tensors.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours.read(name), tensor, rtol=0, atol=1e-6, msg=name)

    @pytest.mark.parametrize("uncovered", ["expert", "base"])
    def test_guided_ties(self, family: Family, home: Path, tmp_path: Path, uncovered: str) -> None:
        data = plain(family, "ties", family.experts, [{"weight": 0.7}, {}], weight=1.2, **{"lambda": 0.9})
        data["models"][1]["calibration"] = data["models"][0]["calibration"] = "sums"
        self.check(data | {"lewis": {"calibrations": SETS, "density": {"uncovered": uncovered}}}, tmp_path)

    def test_filters_and_gradients(self, family: Family, home: Path, tmp_path: Path) -> None:
        own = [
            {
                "weight": [{"filter": "mlp", "value": [0.2, 1.0]}, {"filter": "self_attn.q", "value": "1e-1"}],
                "density": [0.9, 0.5],
            },
            {"density": [{"filter": "norm", "value": 1.0}, {"value": 0.4}]},
        ]
        self.check(plain(family, "ties", family.experts, own, weight=[1.5, -0.5], normalize=False), tmp_path)

    def test_linear(self, family: Family, home: Path, tmp_path: Path) -> None:
        own = [{"weight": [1, 0.25]}, {"weight": [{"filter": "up_proj", "value": 3}, {"value": 0.5}]}]
        self.check(plain(family, "linear", family.experts, own), tmp_path)

    def test_task_arithmetic_with_an_adapter(self, family: Family, home: Path, tmp_path: Path) -> None:
        adapter = Path(f"{family.base}+{family.lora}")
        self.check(
            plain(
                family, "task_arithmetic", [family.math, adapter], [{"weight": 0.5}, {"weight": -0.7}], normalize=True
            ),
            tmp_path,
        )

    @pytest.mark.parametrize(
        "method, experts, with_base, parameters",
        [
            (
                "slerp",
                1,
                True,
                {"t": [{"filter": "mlp", "value": [0, 1]}, {"filter": "norm", "value": 1}, {"value": 0.3}]},
            ),
            ("nuslerp", 2, False, {"weight": [1, 0.25], "nuslerp_flatten": False}),
            ("karcher", 2, True, {"max_iter": 5}),
            ("model_stock", 2, True, {"filter_wise": True}),
            ("breadcrumbs_ties", 2, True, {"weight": 0.5, "density": 0.4, "gamma": [0.01, 0.2]}),
        ],
    )
    def test_other_methods(
        self,
        family: Family,
        home: Path,
        tmp_path: Path,
        method: str,
        experts: int,
        with_base: bool,
        parameters: dict[str, Any],
    ) -> None:
        data = plain(family, method, family.experts[:experts], [{}] * experts, **parameters)
        self.check(data if with_base else {key: data[key] for key in data if key != "base_model"}, tmp_path)


def test_what_export_does_not_write_is_refused_and_modules_are_read() -> None:
    layers = {"model": "a", "layer_range": [0, 2]}
    with pytest.raises(InputError, match="slices: export writes `models`"):
        check_exportable(parse({"merge_method": "passthrough", "slices": [{"sources": [layers]}]}), None)
    of_module = {"modules": {"default": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 2}}}}
    recipe = parse({"merge_method": "linear", "random_seed": 3, **of_module})
    assert [entry.model for entry in recipe.models] == ["a", "b"] and recipe.seed == 3
    written = yaml.safe_load(
        to_mergekit(recipe.text, recipe, recipe.lewis, None, [source(name, name, "0" * 40) for name in "ab"], {})
    )
    assert [each["model"][:2] for each in written["models"]] == ["a@", "b@"] and written["parameters"] == {"weight": 2}
