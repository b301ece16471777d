"""Ask lm-eval which tasks and metrics come with it: an answer for each of its versions."""

from pathlib import Path
from typing import Any

from lewis.rehearsal.question import Question
from lewis.rehearsal.task import Task


class Index(Question):
    """Which tasks, groups and tags come with lm-eval, which reads 14,000 files to know that.

    The answer: name -> kind (`TASK`, `PY_TASK`, `GROUP` or `TAG`), path of its file from lm-eval's package (empty for a
    tag), and the tasks that have the tag.
    """

    name, semantics, libraries, imports = "tasks of lm-eval", 1, ("lm-eval",), Task.imports

    def ask(self) -> dict[str, Any]:
        """Let lm-eval read its files."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        ours = Path(lm_eval.__file__).parent
        return {
            name: [
                entry.kind.name,
                str(Path(entry.yaml_path).relative_to(ours)) if entry.yaml_path else "",
                sorted(entry.tags),
            ]
            for name, entry in TaskManager().task_index.items()
        }


class Metrics(Question):
    """Which metrics lm-eval computes itself. It loads any other name as a script of the `evaluate` library."""

    name, semantics, libraries, imports = "metrics of lm-eval", 1, ("lm-eval",), Task.imports

    def ask(self) -> dict[str, Any]:
        """Return the names."""
        import lm_eval.api.metrics  # noqa: F401 - registers them
        from lm_eval.api.registry import metric_registry

        return {"metrics": sorted(metric_registry)}


INDEX = Index("the tasks of lm-eval", {})
