"""Two models on the same documents, wherever they were scored: the paired table of `lewis compare`."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lewis import store
from lewis.errors import InputError
from lewis.evaluation.statistics.comparison import Comparison, PairingError, compare, holm, table_cells
from lewis.evaluation.statistics.scores import HASH, Evaluated, Samples, Score, by_key, places_of
from lewis.models.source import commits_of
from lewis.store import kinds, sealed_json


class OnMetric(NamedTuple):
    """One model's scores on one metric, from one evaluation.

    Attributes:
        how: digest of everything but the model that decided the scores (`step.scored_as`); empty if unknown.
        content: of the whole evaluation, as `Evaluated.content`.
    """

    how: str
    content: Mapping[str, Any]
    samples: Samples
    score: Score


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared.

    Attributes:
        label: in the table.
        found: its evaluations, each a pair of `how`, as of `OnMetric`, and the scores. Those of all documents come
            first, then those of a part of them (looks of an evaluation that could end early); the last used of each
            kind comes first.
    """

    label: str
    found: Sequence[tuple[str, Evaluated]]

    @classmethod
    def of_store(cls, label: str, keys: Collection[str]) -> "Side":
        """One side of a comparison, with all scores that the store has of a model.

        Args:
            label: in the table.
            keys: identities of the model's content.

        Raises:
            InputError: if the store has no scores of the model.
        """
        entries = [each for each in _entries() if each[1].get("model") in keys]
        if not entries:
            raise InputError(
                f"{label}: the store {store.home()} has no scores of this model; score it with `lewis run`, or give a "
                "folder that lm-eval wrote with --log_samples"
            )
        entries.sort(key=lambda each: ("pools" in each[1], -each[0]))  # only a look has pools
        return cls(label, [(str(each.get("scored_as") or ""), Evaluated.of(label, each)) for _, each in entries])

    @property
    def keys(self) -> dict[str, None]:
        """Every `task/metric,filter` that has a value per document."""
        return {each.key: None for _, found in self.found for each in found.samples}

    @property
    def without_documents(self) -> list[str]:
        """Every `task/metric,filter` that has no value per document, such as an F1 over all documents."""
        scores = (score.key for _, found in self.found for score in found.scores)
        return [key for key in dict.fromkeys(scores) if key not in self.keys]

    def of(self, key: str) -> Iterator[OnMetric]:
        """The scores on one metric, of each evaluation that has it."""
        for how, found in self.found:
            samples, scores = by_key(found.samples), {score.key: score for score in found.scores}
            if key in samples and key in scores:
                yield OnMetric(how, found.content, samples[key], scores[key])


def _entries() -> Iterator[tuple[float, dict[str, Any]]]:
    """Each entry of scores in the store: when it was last used, and its content."""
    for path in kinds.SCORES.entries():
        with suppress(OSError, sealed_json.DamagedError):  # housekeeping removes it meanwhile, or it is damaged
            # Not by `read_entry`, which would mark every entry of the store as used, and the oldest as the newest.
            yield path.stat().st_mtime, sealed_json.read(path)


def scored_keys_of_adapter(adapter: str) -> set[str]:
    """The keys of the scored models in the store that consist of a model and this one adapter on it.

    Args:
        adapter: commit of the adapter.
    """
    models = {str(content.get("model")) for _, content in _entries()}
    return {model for model in models if commits_of(model)[1:] == (adapter,)}


@dataclass(frozen=True)
class Pair:
    """The comparison of both models on one metric.

    Attributes:
        first, second: their scores.
        comparison: how much better the second is.
        holm: the comparison's p, adjusted for the number of metrics.
        prompts: on how many documents the two had different prompts; 0 if that is not known.
    """

    first: Score
    second: Score
    comparison: Comparison
    holm: float
    prompts: int = 0

    def to_json(self) -> dict[str, Any]:
        """The pair as plain data, with None for an infinite bound."""
        found = self.comparison
        return {
            "metric": found.key,
            "higher_is_better": self.second.higher_is_better,
            "scores": [self.first.value, self.second.value],
            "gain": found.delta,
            "low": found.low if math.isfinite(found.low) else None,
            "high": found.high if math.isfinite(found.high) else None,
            "wins": found.wins,
            "losses": found.losses,
            "p": found.p,
            "holm": self.holm,
            "documents": found.documents,
            "other_prompts": self.prompts,
        }

    def to_row(self, first: str, second: str) -> dict[str, str]:
        """A line of the table, with the labels of the two models."""
        found = self.comparison
        return {
            "metric": f"{found.key} {self.second.arrow}",
            first: self.first.text,
            second: self.second.text,
            **table_cells(found, second),
            "Holm's p": f"{self.holm:.3g}",
            "documents": str(found.documents),
        }


def paired(first: Side, second: Side) -> list[Pair]:
    """Compare both models on each metric that both have.

    Raises:
        InputError: if they have none in common; or were scored with another number of examples, by another version of
            a task, or on other documents.
    """
    common = [key for key in second.keys if key in first.keys]
    if not common:
        raise InputError(
            f"{first.label} and {second.label} have no score in common that has a value per document: one has "
            f"{', '.join(first.keys) or 'none'}, the other {', '.join(second.keys) or 'none'}"
        )
    found = [_best(first, second, key) for key in common]
    adjusted = holm({pair.comparison.key: pair.holm for pair in found})
    return [replace(pair, holm=adjusted[pair.comparison.key]) for pair in found]


def _best(first: Side, second: Side, key: str) -> Pair:
    """Compare the last used scores of both models on a metric that have the same documents.

    Scores that were computed alike come first. If there are none, scores with a known difference in the number of
    examples or the version of the task are left out. `holm` of the pair is the p without adjustment.
    """
    options = [(a, b) for b in second.of(key) for a in first.of(key)]
    alike = [(a, b) for a, b in options if a.how and a.how == b.how]
    problems = list[str]()
    for a, b in alike or options:
        task = b.score.task
        shots, versions = ([each.content.get(what, {}).get(task) for each in (a, b)] for what in ("n-shot", "versions"))
        if None not in shots and shots[0] != shots[1]:
            problems.append(
                f"{task}: {first.label} was scored with {shots[0]} examples in the prompt, and {second.label} with "
                f"{shots[1]}; score both with the same num_fewshot"
            )
            continue
        if None not in versions and versions[0] != versions[1]:
            problems.append(
                f"{task}: {first.label} was scored by version {versions[0]} of the task, and {second.label} by "
                f"version {versions[1]}; score both by the same version"
            )
            continue
        try:
            higher = b.score.higher_is_better
            found = compare(b.samples, a.samples, higher_is_better=higher, who=first.label, whose=second.label)
        except PairingError as error:
            problems.append(str(error))
            continue
        return Pair(a.score, b.score, found, found.p, _other_prompts(a.content, b.content, task))
    raise InputError(problems[0])


def _other_prompts(first: Mapping[str, Any], second: Mapping[str, Any], task: str) -> int:
    """On how many documents, which are the same, two models had different prompts; 0 if that is not known."""
    asked = [each.get("prompts", {}).get(task) for each in (first, second)]
    if None in asked:
        return 0
    ours, theirs = (
        dict(zip(places_of(each["documents"][task]), (prompt[:HASH] for prompt in prompts), strict=True))
        for each, prompts in zip((first, second), asked, strict=True)
    )
    return sum(prompt != theirs[document] for document, prompt in ours.items())
