"""Compare a merged model with the gate's reference document by document: differences, losses, and better experts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lewis.evaluation.gate import reference_of
from lewis.evaluation.statistics.retained_gain import BASE, BASELINES, primary_metrics
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Samples, Texts, by_key, places_of

Name = tuple[str, str, int]
"""Task, hash of a document, and its number among equal documents."""


@dataclass(frozen=True)
class Document:
    """One document, and what both models answer to it.

    Attributes:
        key: `task/metric,filter`, the metric of these values.
        higher_is_better: of that metric.
        ours, theirs: the value of the merged model and of the reference.
        had: labels of the experts that score better on this document than the merged model.
        texts: of the merged model and of the reference; None if they were not kept of both.
    """

    name: Name
    key: str
    higher_is_better: bool
    ours: float
    theirs: float
    had: tuple[str, ...] = ()
    texts: tuple[Texts, Texts] | None = field(default=None, repr=False)

    @property
    def gain(self) -> float:
        """How much better the merged model's value is than the reference's, whichever way is better."""
        return self.ours - self.theirs if self.higher_is_better else self.theirs - self.ours

    @property
    def answers_differ(self) -> bool:
        """Whether the answers of both models are known and differ."""
        return self.texts is not None and self.texts[0].answer != self.texts[1].answer


@dataclass(frozen=True)
class SideBySide:
    """Both models on all documents of the tasks' primary metrics.

    Attributes:
        ours, reference: labels of the two.
        experts: labels of the experts that were scored too.
        documents: those for which both models have a value.
    """

    ours: str
    reference: str
    experts: tuple[str, ...]
    documents: tuple[Document, ...]

    def shown(self) -> list[Document]:
        """Documents with known texts: first those that differ in score, then in the answer; equal ones by hash."""
        known = (each for each in self.documents if each.texts)
        return sorted(known, key=lambda each: (not each.gain, not each.answers_differ, each.name[1:]))

    def lost(self) -> list[Document]:
        """Documents on which the merged model is worse: first those with known texts; equal ones by hash."""
        worse = (each for each in self.documents if each.gain < 0)
        return sorted(worse, key=lambda each: (each.texts is None, each.name[1:]))


def side_by_side(metric: str | None, models: Sequence[Scored]) -> SideBySide | None:
    """Compare the merged model document by document with the model that the gate compares it with.

    Args:
        metric: the gate's metric, which is used for its task; each other task is compared by its first metric.
        models: everything that was scored, the merged model last.

    Returns:
        None if nothing else was scored, or the reference is the same model.
    """
    ours, others = (models[-1] if models else None), {model.label: model for model in models[:-1]}
    if ours is None or not others or (reference := reference_of(metric, others)).key == ours.key:
        return None
    experts = [model for label, model in others.items() if label not in (BASE, *BASELINES) and model is not reference]
    documents = list[Document]()
    for key in primary_metrics(ours, metric):
        mine, *rest = (dict(_values(by_key(model.samples).get(key))) for model in (ours, reference, *experts))
        higher = ours.by_name[key].higher_is_better
        sign = 1 if higher else -1
        for name in (name for name in mine if name in rest[0]):
            values = zip(experts, rest[1:], strict=True)
            had = [expert.label for expert, of in values if name in of and sign * (of[name] - mine[name]) > 0]
            both = (ours.texts.get(name), reference.texts.get(name))
            texts = (both[0], both[1]) if both[0] and both[1] else None
            documents.append(Document(name, key, higher, mine[name], rest[0][name], tuple(had), texts))
    return SideBySide(ours.label, reference.label, tuple(each.label for each in experts), tuple(documents))


def _values(samples: Samples | None) -> Iterator[tuple[Name, float]]:
    for part in samples.parts if samples else ():
        values = part.aggregate(part.sums())
        for name, place in places_of(part.documents).items():
            if math.isfinite(value := float(values[place])):
                yield (part.task, *name), value
