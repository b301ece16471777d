"""The block `serve` of a recipe: where the champion goes into service, in this order."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, field_validator

from lewis.recipe.block import Block

_NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
_URL = r"^https?://[^\s/?#@]+(/[^\s?#]*)?$"  # without user, password and query: recipes are read by many


class Target(Block):
    """A target: what puts the champion into service.

    Attributes:
        kind: how it does that.
        name: of the target, for `lewis served`; by default its kind.
    """

    kind: str
    name: str = Field(default="", pattern=rf"^$|{_NAME}", max_length=40)

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name or self.kind


class WebhookTarget(Target):
    """A signed POST, in the form of MLflow's webhooks.

    Attributes:
        url: where it goes.
        timeout_seconds: for one attempt.
    """

    kind: Literal["webhook"]
    url: str = Field(pattern=_URL)
    timeout_seconds: float = Field(default=30, gt=0, le=600)


class CommandTarget(Target):
    """A program on the worker's machine, which gets the facts of the model by its environment.

    Attributes:
        run: name of the program in the folder `LEWIS_SERVE_PROGRAMS`, then its arguments; no shell reads them.
        timeout_minutes: how long it may take.
    """

    kind: Literal["command"]
    run: tuple[str, ...] = Field(min_length=1)
    timeout_minutes: float = Field(default=60, gt=0)

    @field_validator("run")
    @classmethod
    def _check_program(cls, run: tuple[str, ...]) -> tuple[str, ...]:
        if not re.fullmatch(r"\w[\w.-]*", run[0], re.ASCII):
            raise ValueError(f"expected the name of a program in LEWIS_SERVE_PROGRAMS, without a path, got {run[0]!r}")
        return run


TARGETS: Mapping[str, type[Target]] = {"webhook": WebhookTarget, "command": CommandTarget}
"""Kind -> its block."""


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, Mapping) else value


def _check_names(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    for label, count in Counter(each.label for each in targets).items():
        if count > 1:
            raise ValueError(f"{count} targets are called {label!r}; give each a `name` of its own")
    return targets


Serve = Annotated[
    tuple[Annotated[WebhookTarget | CommandTarget, Discriminator("kind")], ...],
    BeforeValidator(_as_list),
    AfterValidator(_check_names),
]
"""One target or a list of them."""
