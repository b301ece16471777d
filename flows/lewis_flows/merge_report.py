"""What a run of the flow `merge` gives back."""

from pathlib import Path

from pydantic import BaseModel

from lewis.allocation.step import AllocationEntry
from lewis.merging.step import MergedModel


class MergeReport(BaseModel):
    """What a run of the DAG gives back.

    Attributes:
        recipe: its name.
        digest, folder: of the merged checkpoint, or adapter, in the store.
        adapter: what the adapter holds and what error it leaves; None for a full model.
        fit: what `ridge: auto` chose and what held-back rows say of the fit, as a sentence; else empty.
        mean_density: expert -> parameter-weighted mean density; empty for a plain merge.
        scores: rows of the score table.
        comparison: rows of the merged model against each other model: gain, interval, wins, losses, p.
        kept: rows of how much of each expert's gain over the base is kept; empty if base or experts are not scored.
        version: `models:/name/version`, if the recipe registers.
        created: whether that version is new.
        promoted: whether it is the champion now.
        waits: whether it passed the gate, and a person has to approve it.
        verdict: the gate's reasons.
        published: URL of the champion on the Hub, if the recipe publishes.
        page: the report of the run as an HTML file.
    """

    recipe: str
    digest: str
    folder: Path
    adapter: str | None = None
    fit: str = ""
    mean_density: dict[str, float] = {}
    scores: list[dict[str, str]] = []
    comparison: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    version: str | None = None
    created: bool = False
    promoted: bool = False
    waits: bool = False
    verdict: list[str] = []
    published: str | None = None
    page: Path | None = None

    @classmethod
    def of(cls, recipe: str, merged: MergedModel, allocated: AllocationEntry | None) -> "MergeReport":
        """The report of a merge before it is scored."""
        adapter = merged.adapter.to_text() if merged.adapter else None
        means = allocated.means if allocated else {}
        return cls(
            recipe=recipe,
            digest=merged.digest,
            folder=merged.folder,
            adapter=adapter,
            fit=merged.fit,
            mean_density=means,
        )
