"""Which projections write into the residual stream."""

from pathlib import Path

import pytest

from lewis.importance.measure import network_of
from lewis.importance.residuals import writers
from lewis.merging.fitting.fit import in_order
from lewis.models.checkpoint import Checkpoint
from tests.support.tiny_architectures import tiny


@pytest.mark.parametrize(
    "kind, found",
    [
        ("llama", {"self_attn.o_proj": "", "mlp.down_proj": ".post_attention_layernorm"}),
        ("mixtral", {"self_attn.o_proj": ""}),  # which experts get tokens is asked of the router
        ("glm4_moe", {"self_attn.o_proj": ""}),  # its router has a buffer
    ],
)
def test_of_dense_models_and_mixtures(kind: str, found: dict[str, str], tmp_path: Path) -> None:
    """Of nearly all mixtures none was found, so that `residual` did nothing."""
    tiny(kind).save_pretrained(tmp_path)
    network = network_of(Checkpoint(tmp_path, kind))
    streams = writers(network, [each.parameter.rpartition(".")[0] for each in in_order(network)])
    block = "model.layers.1"
    expected = {f"{block}.{path}": f"{block}{stream}" for path, stream in found.items()}
    assert {path: stream for path, stream in streams.items() if path.startswith(block)} == expected
