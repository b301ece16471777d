"""Keep the rows of a base's embeddings when lm-eval puts an adapter on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lewis.models.files.safetensors_file import file_headers
from lewis.models.lora.expert import WEIGHTS
from lewis.models.names import PER_TOKEN


@contextmanager
def keep_rows(adapter: str | None) -> Iterator[None]:
    """Meanwhile, embeddings are resized only to what an adapter needs.

    lm-eval resizes the base's embeddings to the number of tokens, for adapters with tokens of their own. Many bases
    have more rows than tokens. An adapter that saves all of them would then not load, and one that does not would be
    scored on fewer tokens than its base.

    Args:
        adapter: folder of the adapter; None changes nothing.
    """
    if adapter is None:
        yield
        return
    import transformers

    owner: Any = transformers.PreTrainedModel
    wanted, resize = _rows(Path(adapter)), owner.resize_token_embeddings

    def resized(model: Any, new_num_tokens: int, *arguments: Any, **options: Any) -> Any:
        present = model.get_input_embeddings().weight.shape[0]
        rows = wanted or max(new_num_tokens, present)
        return model.get_input_embeddings() if rows == present else resize(model, rows, *arguments, **options)

    owner.resize_token_embeddings = resized
    try:
        yield
    finally:
        owner.resize_token_embeddings = resize


def _rows(adapter: Path) -> int | None:
    """How many rows the embeddings and the head have that an adapter changes; None if it changes none."""
    for name, (_, shape) in file_headers(adapter / WEIGHTS).items():
        if name.endswith((*PER_TOKEN, "lm_head.lora_B.weight")):
            return shape[0]
        if name.endswith("lora_embedding_A"):
            return shape[1]
    return None
