"""What is in the folder of a full model that is written to be scored."""

from pathlib import Path

import pytest

from lewis.evaluation.harness.model_folder import loadable
from lewis.models.source import ModelFiles
from tests.conftest import Family
from tests.support.models import shard, write_lora


@pytest.mark.parametrize("adapters", [1, 2])
def test_the_configs_of_processors_are_copied(adapters: int, family: Family, tmp_path: Path, home: Path) -> None:
    """Without them vLLM and SGLang start no model with a tower for images or sound, not even to score text."""
    base = shard(family.base, tmp_path / "base", parts=1)
    adapter = write_lora(family.base, tmp_path / "adapter")
    names = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    for name in names:
        (base / name).write_text(f'{{"of": "{name}"}}')
    files = ModelFiles.at("x", "base+one+two", base, adapter, [adapter] * (adapters - 1))
    with loadable(files, whole=True) as (folder, left):
        assert folder != base and left is None
        assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in names)
