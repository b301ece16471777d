# temporary: until the wings take inputs
from dataclasses import dataclass

from lewis.allocation import step as alloc
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
