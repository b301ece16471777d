"""`LEWIS_EVALUATE_QUEUE`: the work queue whose workers score models, such as those near GPUs."""

import os
import re

from lewis.errors import InputError

SETTING = "LEWIS_EVALUATE_QUEUE"


def queue() -> str:
    """Its name; empty if models are scored where they are merged.

    Raises:
        InputError: if no work queue can have that name.
    """
    name = os.environ.get(SETTING, "").strip()
    if re.search(r"[/%&<>\s]", name):
        raise InputError(f"{SETTING}: expected the name of a work queue, such as gpu, got {name!r}; set or unset it")
    return name
