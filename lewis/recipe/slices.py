"""mergekit's `slices`: which layers of which models become the layers of the result, one slice after another."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from lewis.recipe.block import Block, ModelName, Parameters


class SliceSource(Block):
    """Consecutive layers of one model that are merged into a slice.

    Attributes:
        layer_range: number of the first layer, and of the layer after the last.
        parameters: method parameters of this model in this slice.
        calibration: name of the calibration set, as in an entry of `models`.
    """

    model: ModelName
    layer_range: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    parameters: Parameters = Field(default_factory=dict)
    calibration: str | None = None

    def _contradictions(self) -> Iterator[str]:
        if self.layers <= 0:
            given = list(self.layer_range)
            yield f"layer_range: expected [first, after the last], such as [0, 8] for eight layers, got {given}"

    @property
    def layers(self) -> int:
        """How many layers of the model the range has."""
        return self.layer_range[1] - self.layer_range[0]


class OutputSlice(Block):
    """Consecutive layers of the merged model.

    Attributes:
        sources: the layers that are merged: the slice's first layer from the first layer of each source, and so on.
        base_model: base of this slice, in place of the recipe's `base_model`.
        parameters: method parameters of this slice; those of a source override them, and they override the top level's.
    """

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: ModelName | None = None
    parameters: Parameters = Field(default_factory=dict)

    def _contradictions(self) -> Iterator[str]:
        counts = [source.layers for source in self.sources]
        if len(set(counts)) > 1:
            yield f": expected as many layers of each source, got {', '.join(map(str, counts))}"
        names = [source.model for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield (
                f": {twice!r} is listed twice in one slice, whose sources are merged with each other; put layers that "
                "follow each other into slices of their own"
            )

    @property
    def layers(self) -> int:
        """How many layers of the merged model the slice makes."""
        return self.sources[0].layers
