"""Keep task files from running code that the recipe does not allow. Called in the process that runs lm-eval."""

import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, runtime
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

_PLAIN = (str, bytes, int, float, complex, list, tuple, set, frozenset, dict, datetime.date, datetime.time, type(None))
_JINJA = (runtime.LoopContext, runtime.Macro, runtime.TemplateReference, runtime.Undefined, Cycler, Joiner, Namespace)


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, in which only plain data and Jinja's own objects have attributes and methods.

    A document may hold other objects, such as a picture, whose methods write files. A template is compiled once, and
    not for each document as lm-eval would have it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._compiled = lru_cache(100)(super().from_string)

    def from_string(self, source: Any, *arguments: Any, **options: Any) -> Template:
        if arguments or options or not isinstance(source, str):
            return super().from_string(source, *arguments, **options)
        return self._compiled(source)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return isinstance(obj, _PLAIN + _JINJA) and super().is_safe_attribute(obj, attr, value)


def sandbox_templates() -> None:
    """Let lm-eval render all templates of tasks in Jinja's sandbox.

    Models' chat templates need nothing: transformers renders them in Jinja's sandbox.
    """
    from lm_eval import utils

    plain = utils.env
    safe = _Sandbox(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    safe.filters.update(plain.filters)
    vars(utils)["env"] = safe


def refuse_functions() -> None:
    """Let lm-eval load no function of a task file, except those of the tasks that are installed with it.

    The recipe's task files were checked before. This holds if one has changed since.
    """
    from lm_eval import tasks
    from lm_eval.tasks import _factory, _yaml_loader

    ours = Path(tasks.__file__).resolve().parent
    load_function, load_yaml = _yaml_loader._import_func_in_yml, _factory.load_yaml

    def function(name: str, folder: Path) -> Any:
        if not Path(folder).resolve().is_relative_to(ours):
            raise ValueError(f"!function {name} of {folder}: the recipe does not say `allow_code_execution: true`")
        return load_function(name, folder)

    def yaml(path: Path, **options: Any) -> Any:
        config = load_yaml(path, **options)
        if config.get("unsafe_code"):
            raise ValueError(f"{path} runs code that the model writes; the recipe does not allow it")
        return config

    vars(_yaml_loader)["_import_func_in_yml"] = function
    vars(_factory)["load_yaml"] = yaml
