"""Pictures are decoded and their pixels compared."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from lewis.evaluation.statistics.scores import Score
from lewis.reports import charts

PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def densities(layers: int, value: float) -> dict[str, float]:
    return {f"model.layers.{i}.{name}.weight": value for i in range(layers) for name in PROJECTIONS}


def score(task: str, value: float, metric: str = "acc,none", stderr: float | None = 0.02) -> Score:
    return Score(task, metric, value, stderr, higher_is_better="perp" not in metric, samples=100)


def pixels(png: bytes) -> np.ndarray:
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) < 150_000
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).astype(int)


def share(png: bytes, value: float) -> float:
    """Share of the picture that has viridis' colour of `value`."""
    colour = np.array(colormaps["viridis"](value, bytes=True)[:3], dtype=int)
    return float((abs(pixels(png) - colour).max(axis=1) <= 1).mean())


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_the_colour_says_the_density_on_a_fixed_scale(value: float) -> None:
    png = charts.density_heat_map({"e": densities(20, value)}, {"e": value})
    assert share(png, value) > 0.4
    assert share(png, 0.6) < 0.02


@pytest.mark.slow
def test_there_is_a_panel_per_expert_and_a_hole_where_a_layer_has_no_such_projection() -> None:
    one = charts.density_heat_map({"e": densities(20, 0.3)}, {})
    two = charts.density_heat_map({"e": densities(20, 0.3), "f": densities(20, 0.8)}, {"f": 0.8})
    assert Image.open(io.BytesIO(two)).width >= 2 * Image.open(io.BytesIO(one)).width
    assert share(two, 0.3) > 0.1 and share(two, 0.8) > 0.1
    holes = {name: value for name, value in densities(20, 0.3).items() if "layers.5.mlp" not in name}
    grey = (pixels(charts.density_heat_map({"e": holes}, {})) == 211).all(axis=1).mean()
    assert 0.005 < grey < 0.05  # one cell in sixty


def test_rows_are_projections_and_columns_are_layers() -> None:
    names, grid = charts.grid_of(
        {
            "model.embed_tokens.weight": 1.0,
            "model.layers.1.self_attn.q_proj.weight": 0.5,
            "model.layers.0.self_attn.q_proj.weight": 0.4,
            "model.layers.0.self_attn.q_proj.bias": 1.0,
            "model.layers.0.input_layernorm.weight": 1.0,
            "model.layers.0.mlp.experts.0.w1.weight": 0.6,
            "model.layers.0.mlp.experts.1.w1.weight": 0.7,
        }
    )
    assert names == ["q_proj", "mlp.experts.0.w1", "mlp.experts.1.w1"]
    assert grid[0] == [0.4, 0.5]
    assert [row[0] for row in grid[1:]] == [0.6, 0.7] and all(np.isnan(row[1]) for row in grid[1:])


def test_a_dollar_sign_in_a_name_begins_no_formula() -> None:
    """A run ended with an error of matplotlib, after it had scored all models."""
    found = score("$_$", 0.5, "$^$,none")
    assert len(pixels(charts.score_bars({"$\\x$": [found], "merged": [found]}))) > 0
    assert len(pixels(charts.champion_steps([(1, 1, "promoted", 0.5, 0.5)], found.key))) > 0
    assert len(pixels(charts.density_heat_map({"$_$": densities(2, 0.5)}, {}))) > 0


def test_layers_of_an_encoder_and_a_decoder_stay_apart() -> None:
    own = {"encoder.block.0.layer.0.SelfAttention.q.weight": 0.4, "decoder.block.0.layer.0.SelfAttention.q.weight": 0.6}
    names, grid = charts.grid_of(own)
    assert names == ["encoder.block.layer.0.SelfAttention.q", "decoder.block.layer.0.SelfAttention.q"]
    assert grid == [[0.4], [0.6]]
    with warnings.catch_warnings(action="error"):  # of matplotlib, if the names leave no room for the rest
        assert share(charts.density_heat_map({"e": own}, {}), 0.4) > 0.01


@pytest.mark.slow
def test_layers_go_down_and_projections_across() -> None:
    few, many = (charts.density_heat_map({"e": densities(n, 0.3)}, {}) for n in (10, 80))
    low, high = (Image.open(io.BytesIO(picture)) for picture in (few, many))
    assert low.width == high.width and high.height - low.height >= 70 * 17 - 1  # pixels: each layer has its label


def test_names_of_many_experts_do_not_overlap() -> None:
    for columns, shown in ((7, 7), (48, 48), (100, 34)):
        panel = Figure().subplots()
        charts._draw_grid(panel, [f"p{i}" for i in range(columns)], [[0.5]] * columns)
        names = {tick.get_position()[0]: tick.get_text() for tick in panel.get_xticklabels()}
        assert len(names) == shown and all(text == f"p{place:.0f}" for place, text in names.items())


@pytest.mark.slow
def test_large_models_stay_small_pictures() -> None:
    rng = np.random.default_rng(0)
    noisy = {f"model.layers.{i}.p{n}.weight": rng.random() for i in range(80) for n in range(7)}
    assert len(charts.density_heat_map({f"expert-{n}": noisy for n in range(4)}, {})) < 150_000
    many = {f"model-{m}": [score(f"task_{t}", rng.random()) for t in range(200)] for m in range(6)}
    assert len(charts.score_bars(many)) < 150_000


def test_bars_have_the_height_of_the_score() -> None:
    low, high = (charts.score_bars({"base": [score("t", v, stderr=None)], "m": [score("t", 1.0)]}) for v in (0.2, 0.8))
    assert 3.5 < share(high, 0.1) / share(low, 0.1) < 4.5


def test_an_interval_is_drawn_where_it_is_given() -> None:
    scores = {"base": [score("t", 0.5, stderr=None)], "m": [score("t", 0.5, stderr=None)]}
    plain, wide = (charts.score_bars(scores, ends) for ends in ({}, {("base", "t", "acc,none"): (0.1, 0.9)}))
    grey = [int((abs(pixels(png) - 105).max(axis=1) <= 2).sum()) for png in (plain, wide)]  # dimgrey
    assert grey[0] + 50 < grey[1]  # antialiased text has a few such points


def test_a_model_without_a_score_and_another_scale_are_drawn() -> None:
    base = [score("t", 0.5), score("wiki", 14.0, "perplexity,none", stderr=None)]
    one = charts.score_bars({"base": [score("t", 0.5)], "lewis": []})
    two = charts.score_bars({"base": base, "lewis": [score("t", 0.6)]})
    assert Image.open(io.BytesIO(two)).height == 2 * Image.open(io.BytesIO(one)).height


def test_nothing_to_draw_is_still_a_picture() -> None:
    assert pixels(charts.score_bars({})).size and pixels(charts.density_heat_map({}, {})).size


@pytest.mark.slow
def test_threads_draw_the_same_picture() -> None:
    with ThreadPoolExecutor(4) as threads:
        drawn = set(threads.map(lambda _: charts.density_heat_map({"e": densities(4, 0.5)}, {}), range(4)))
    assert len(drawn) == 1
