# temporary: until the wings take inputs
from dataclasses import dataclass
from pathlib import Path

from lewis.allocation import step as alloc
from lewis.evaluation import step as ev
from lewis.inspection import step as insp
from lewis.models.source import ModelFiles


@dataclass(frozen=True)
class AllocationInput:
    recipe: object
    base: ModelFiles
    experts: tuple
    measured: list

    @property
    def args(self):
        return self.recipe, self.base, self.experts, self.measured


def allocation_digest(given):
    return alloc._allocation_place(*given.args)[0]


def find_allocated(given):
    return alloc.find_allocated(*given.args)


def allocate(given):
    return alloc.allocate(*given.args)


@dataclass(frozen=True)
class InspectionInput:
    config: object
    base: ModelFiles
    experts: tuple

    def identity(self):
        return [self.config.model_dump(mode="json"), self.base.key, [e.key for e in self.experts]]


def find_inspected(given):
    return None


def inspect(given, report=None):
    return insp.inspect(
        given.config, given.base, given.experts, progress=report and (lambda d, t: report("inspect", d, t))
    )


class _S:
    pass


@dataclass(frozen=True)
class EvalSettings:
    inner: object
    root: Path

    def __getattr__(self, n):
        if n.startswith("__"):
            raise AttributeError(n)
        return getattr(object.__getattribute__(self, "inner"), n)


def eval_settings(block, root):
    r = _S()
    r.evaluate = block
    return EvalSettings(ev.eval_settings(r), root)


def scores_digest(key, settings, device):
    return ev._scores_place(key, settings.inner, settings.root, device)[0]


def find_scores(ref, key, settings, device):
    return ev.find_scores(ref, key, settings.inner, settings.root, device)


def score(files, settings, *, device, progress):
    return ev.score(
        files, settings.inner, root=settings.root, device=device, progress=lambda f, w: progress(w, int(1000 * f), 1000)
    )


def find_all_scores(models, settings):
    return ev.find_all_scores(models, settings.inner, settings.root)
