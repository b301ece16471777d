"""Whatever a recipe says, `lewis merge` ends with a whole, finite model, or with a reason and nothing written.

LEWIS_RECIPE_DRAWS says how many recipes are drawn (60, always the same ones; other numbers: others each time).
"""

import contextlib
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lewis.methods import METHODS, Parameter
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.lewis.merging.vocabulary.test_alignment import WORDS, with_vocabulary
from tests.support.models import rewrite

DRAWS = int(os.environ.get("LEWIS_RECIPE_DRAWS", "60"))
SHARES = st.floats(0.05, 1)
ODD = st.sampled_from(
    [
        0,
        -1,
        2,
        1e-9,
        1e38,
        -1e38,
        float("nan"),
        float("inf"),
        "1e-1",
        "half",
        True,
        None,
        10**400,
        [],
        {"valu": 1},
        [{}],
    ]
)
FILTERS = st.sampled_from(["mlp", "self_attn", "layers.0.", "*", "lm_head", "nothing", "", 3])
ODD_SETTINGS = st.one_of(
    ODD,
    st.lists(st.one_of(ODD, SHARES), max_size=3),
    st.lists(
        st.fixed_dictionaries({"value": st.one_of(ODD, SHARES)}, optional={"filter": FILTERS}), min_size=1, max_size=2
    ),
)
FINE = ["math", "code", "lora", "half"]
BROKEN = ["base", "nan", "headless", "tokens", "absent", "", 3]
PLACES = ["method", "models", "parameters", "own", "dtype", "tokenizer", "exclude", "seed", "lewis", "slices", "base"]


def fitting(name: str, parameter: Parameter) -> st.SearchStrategy[Any]:
    """A setting that a parameter takes: a value, a gradient, or a list with a filter."""
    low, high = max(parameter.range.low, 0.05), min(parameter.range.high, 1.0)
    value: st.SearchStrategy[Any] = st.floats(low, high) if name != "density" else SHARES
    if parameter.kind is not float:
        return st.booleans() if parameter.kind is bool else st.integers(1, 9)
    filtered = value.map(lambda v: [{"filter": "mlp", "value": v}, {"value": v / 2 if low <= v / 2 else v}])
    return st.one_of(value, value, st.lists(value, min_size=1, max_size=3), filtered)


def lewis(odd: bool) -> st.SearchStrategy[Any]:
    """A `lewis` block; an odd one has values that are no good anywhere in it."""
    wrong = [ODD] if odd else []
    return st.fixed_dictionaries(
        {"calibrations": st.one_of(st.just({"s": {"texts": ["w1 w2 w3"], "samples": 1}}), *wrong)},
        optional={
            "prune_by": st.one_of(st.sampled_from(["magnitude", "activation"]), *wrong),
            "aim": st.one_of(st.fixed_dictionaries({}, optional={"omega": st.one_of(SHARES, *wrong)}), *wrong),
            "density": st.fixed_dictionaries(
                {
                    "strategy": st.sampled_from(["lewis", "uniform", "owl", "dlp", "depth_gradient", "global"]),
                    "min": st.one_of(st.floats(0.1, 0.3), *wrong),
                    "max": st.one_of(st.floats(0.5, 0.8), *wrong),
                },
                optional={
                    "budget": st.one_of(st.floats(0.3, 0.5), *wrong),
                    "uncovered": st.one_of(st.sampled_from(["expert", "base", "mean"]), *wrong),
                },
            ),
        },
    )


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe whose models are named. None is to be left out. In up to two places it is likely to be wrong."""
    wrong = draw(st.lists(st.sampled_from(PLACES), max_size=2, unique=True))
    method = draw(st.sampled_from(list(METHODS)))
    known, (low, high) = METHODS[method].parameters, METHODS[method].experts

    def parameters(names: list[str], place: str) -> dict[str, Any]:
        chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        chosen += [name for name in names if known[name].required and name not in chosen]
        odd = {draw(st.sampled_from([*known, "densty"])): draw(ODD_SETTINGS)} if place in wrong else {}
        return {name: draw(fitting(name, known[name])) for name in chosen} | odd

    pool = [*FINE, *BROKEN] if "models" in wrong else FINE
    count = draw(st.integers(low, min(high or 3, 3))) if "models" not in wrong else draw(st.integers(0, 3))
    own = [name for name, parameter in known.items() if parameter.per_expert]
    models = draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count, unique_by=str))
    by_base = METHODS[method].needs_base or ("lora" in models) != ("base" in wrong)
    data: dict[str, Any] = {
        "merge_method": method if "method" not in wrong else "tyes",
        "base_model": "base" if by_base and "base" not in wrong else draw(st.sampled_from([None, "half", "absent"])),
        "models": [{"model": model, "parameters": parameters(own, "own")} for model in models],
        "parameters": parameters([name for name in known if name not in own], "parameters"),
        "dtype": draw(st.sampled_from([None, "float32", "float16", "bfloat16"])) if "dtype" not in wrong else draw(ODD),
        "tokenizer_source": draw(st.sampled_from([None, None, "union", "base", *models])),
    }
    if "tokenizer" in wrong:
        block = {"pad_to_multiple_of": st.one_of(st.just(8), ODD), "source": st.sampled_from(["union", "tokens", 5])}
        block["tokens"] = st.dictionaries(
            st.sampled_from(["<q>", "w1", "<a>", ""]),
            st.sampled_from(
                [
                    {"source": {"kind": "zero"}},
                    {"force": True},
                    {"source": "math", "force": True},
                    {"source": {"kind": "model_token", "model": "base", "token_id": 5}},
                    {"source": {"kind": "model_token", "model": "base", "token": "w77"}},
                    {"source": {"kind": "model_token", "token": "w7"}},
                    3,
                ]
            ),
            max_size=2,
        )
        data |= {"tokenizer_source": None, "tokenizer": draw(st.fixed_dictionaries({}, optional=block))}
    if "exclude" in wrong or (data["base_model"] and draw(st.integers(0, 4)) == 0):
        pool = [["mlp"], ["embed", "layers.*.mlp"], *([["*"], [""], ["absent"], [3], 3] if "exclude" in wrong else [])]
        data["exclude"] = draw(st.sampled_from(pool))
    data["seed"] = draw(ODD) if "seed" in wrong else None
    if "lewis" in wrong or ("density" in known and data["base_model"] and draw(st.booleans())):
        data["lewis"] = draw(lewis("lewis" in wrong))
    return data | ({"slices": []} if "slices" in wrong else {})


@pytest.fixture(scope="module")
def models(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a recipe of this test may name: fine models, and such as cannot be merged."""
    place = tmp_path_factory.mktemp("models")
    found = {"base": family.base, "math": family.math, "code": family.code, "lora": family.lora}
    found["tokens"] = with_vocabulary(family.code, place / "tokens", [*WORDS, "x1"], ["<a>", "<b>"])
    found["half"] = rewrite(family.math, place / "half", lambda _, t: (t * 1.01).to(torch.bfloat16))
    found["nan"] = rewrite(family.math, place / "nan", lambda n, t: t * float("nan") if "up_proj" in n else t)
    found["headless"] = rewrite(family.math, place / "headless", lambda n, t: None if "norm" in n else t)
    return found | {"absent": place / "absent"}


def named(value: Any, models: dict[str, Path], key: str = "") -> Any:
    """The recipe with folders for the names of models; `base` is a policy for a tokenizer."""
    if isinstance(value, dict):
        return {k: named(each, models, k) for k, each in value.items() if each is not None}
    if isinstance(value, list):
        return [named(each, models) for each in value]
    if not isinstance(value, str) or (value, key) in (("base", "tokenizer_source"), ("base", "uncovered")):
        return value
    return str(models.get(value, value))


def test_it_merges_or_says_why(models: dict[str, Path], home: Path, tmp_path: Path) -> None:
    outcomes: Counter[int] = Counter()
    shapes = {name: tensor.shape for name, tensor in load_file(models["base"] / "model.safetensors").items()}

    @settings(
        max_examples=DRAWS, derandomize=DRAWS == 60, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(recipes())
    def one(data: dict[str, Any]) -> None:
        recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
        data = named(data, models)
        recipe.write_text(yaml.safe_dump(data))
        shutil.rmtree(out, ignore_errors=True)
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = main(["merge", str(recipe), "-o", str(out), "--max-shard-size", "1MB"])
        outcomes[code] += 1
        assert {path.name for path in tmp_path.iterdir()} <= {"home", "recipe.yaml", "out"}
        if code != 0:
            assert code in (1, 2) and not out.exists()
            assert "lewis: " in told.getvalue() and "Traceback" not in told.getvalue()
            return
        merged = load_file(out / "model.safetensors")
        rows = json.loads((out / "config.json").read_text())["vocab_size"]
        assert merged.keys() == shapes.keys()
        for name, tensor in merged.items():
            assert bool(tensor.isfinite().all()), name
            assert tensor.shape == ((rows, *shapes[name][1:]) if "embed" in name else shapes[name])
        assert max(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab().values()) < rows

    one()
    assert outcomes[0] >= DRAWS / 10 and outcomes[2] >= DRAWS / 10, outcomes
