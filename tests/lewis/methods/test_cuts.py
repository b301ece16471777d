"""The k largest of scores that come in pieces are those of the scores as a whole."""

from collections.abc import Iterator

import pytest
import torch

from lewis.methods.arithmetic import cuts as module
from lewis.methods.arithmetic.cuts import cuts, keys, kth_largest, number_of
from lewis.methods.arithmetic.sparsify import largest


@pytest.mark.parametrize("room", [16, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["smooth", "few values", "one value", "mostly zero", "tiny"])
def test_the_cut_is_that_of_the_whole(
    kind: str, dtype: torch.dtype, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOM", room)
    smooth = torch.randn(3001, generator=torch.Generator().manual_seed(0), dtype=dtype).abs()
    scores = {
        "smooth": smooth,
        "few values": (smooth * 2).round(),
        "one value": torch.ones_like(smooth),
        "mostly zero": torch.where(smooth < 2, 0.0, smooth),
        "tiny": smooth * torch.finfo(dtype).smallest_normal,
    }[kind]
    sets = [scores, scores.flip(0), scores]
    counts = [1, 500, 3000]

    def passes(size: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        for start in range(0, len(scores), size):
            yield start, [own[start : start + size] for own in sets]

    for size in (1000, 4000):
        found = cuts(lambda size=size: passes(size), counts)  # type: ignore[misc]
        for own, k, cut in zip(sets, counts, found, strict=True):
            kept = torch.cat([cut.keeps(own[start : start + 700], start) for start in range(0, len(own), 700)])
            assert torch.equal(kept, largest(own, k)) and int(kept.sum()) == k
    none, every = cuts(lambda: ((start, two[:2]) for start, two in passes(1000)), [0, len(scores)])
    assert not none.keeps(scores, 0).any() and every.keeps(scores, 0).all()


def test_numbers_with_signs_keep_their_order() -> None:
    numbers = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ordered = numbers.sort(descending=True).values.tolist()
    found = kth_largest(lambda: ([keys(part)] * 3 for part in numbers.split(7)), [1, 250, 500])
    assert [number_of(each.key) for each in found] == [ordered[0], ordered[249], ordered[499]]
