# temporary: until the wings take inputs
from dataclasses import dataclass

from lewis.inspection import step as insp
from lewis.models.source import ModelFiles


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
