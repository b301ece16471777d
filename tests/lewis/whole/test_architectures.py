"""A guided merge of tiny models of many architectures; `python -m tests.benchmarks.architectures` tries all."""

from pathlib import Path

import pytest

from tests.support.architecture_check import check

pytestmark = pytest.mark.usefixtures("home")

# What else is in them -> the share of the blocks' parameters that must be covered, in percent.
KINDS = {
    "qwen3_vl_moe": 99,  # a vision tower, whose blocks no text goes through; stacked experts
    "mistral3": 99,
    "blip-2": 96,  # its own forward pass wants an image
    "kimi_linear": 98,  # linear attention; experts that a regular expression names
    "t5": 98,
    "paligemma": 99,  # its text looks ahead, but not next to padding
    "marian": 96,  # positions that are computed, not stored
    "switch_transformers": 94,  # a router that moves its weights; an expert that no token reaches
    "zamba2": 66,  # blocks that share their weights
}


MAIN = ("qwen3_vl_moe", "t5", "switch_transformers")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in MAIN else pytest.mark.long) for k in KINDS])
def test_a_guided_merge_is_right_in_every_way(kind: str, tmp_path: Path) -> None:
    found = check(kind, tmp_path)
    assert found.covered > KINDS[kind] / 100 - 0.005, found.left
    assert found.moments
