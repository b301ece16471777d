"""What lm-eval must not do while it runs tasks: run code of a template, load functions unasked, list all packages."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, runtime
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from lewis import private_names

_PLAIN = (str, bytes, int, float, complex, list, tuple, set, frozenset, dict, datetime.date, datetime.time, type(None))
_JINJA = (runtime.LoopContext, runtime.Macro, runtime.TemplateReference, runtime.Undefined, Cycler, Joiner, Namespace)


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, in which only plain data and Jinja's own objects have attributes and methods.

    A document may hold other objects, such as a picture, whose methods write files. A template is compiled only once;
    lm-eval alone would compile it for each document.
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


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """In the block, let lm-eval render all templates of tasks in Jinja's sandbox.

    Models' chat templates need nothing: transformers renders them in Jinja's sandbox.
    """
    plain = private_names.LM_EVAL_ENV.get()
    safe = _Sandbox(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    safe.filters.update(plain.filters)
    with private_names.LM_EVAL_ENV.replaced(safe):
        yield


@contextmanager
def functions_refused() -> Iterator[None]:
    """In the block, let lm-eval load no function of a task file, except those of the tasks that it brings.

    The recipe's task files were checked before, but one may have changed since. If that one now runs what the model
    writes (`unsafe_code`), lm-eval itself refuses it, since it gets no `confirm_run_unsafe_code`.
    """
    from lm_eval import tasks

    ours = Path(tasks.__file__).resolve().parent
    load_function = private_names.LM_EVAL_IMPORT_FUNCTION.get()

    def function(name: str, folder: Path) -> Any:
        if not Path(folder).resolve().is_relative_to(ours):
            raise ValueError(f"!function {name} of {folder}: the recipe does not say `allow_code_execution: true`")
        return load_function(name, folder)

    with private_names.LM_EVAL_IMPORT_FUNCTION.replaced(function):
        yield


@contextmanager
def no_package_list() -> Iterator[None]:
    """In the block, let lm-eval not list all installed packages with pip, which takes seconds and nobody reads."""
    with private_names.LM_EVAL_ENVIRONMENT.replaced(lambda _: None):
        yield
