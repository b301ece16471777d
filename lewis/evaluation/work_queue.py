"""`LEWIS_EVALUATE_QUEUE` and `LEWIS_EVALUATE_POOL`: the queue, and its pool, whose workers score models."""

from lewis import settings

MERGES = settings.EVALUATE_POOL.default
"""The work pool of all runs other than evaluations."""


def queue() -> str:
    """Name of the work queue (`default` in a pool of its own); empty if models are scored where they are merged.

    Raises:
        InputError: if no work queue, or no work pool, can have the name that was given.
    """
    return settings.EVALUATE_QUEUE.get() or ("default" if pool() != MERGES else "")


def pool() -> str:
    """Name of the work pool that has the queue: the pool of the merges, unless another one is set.

    Raises:
        InputError: if no work pool can have the name that was given.
    """
    return settings.EVALUATE_POOL.get()


def place(name: str) -> str:
    """A work queue as messages name it, with its work pool if that is not the pool of the merges."""
    return f"work queue {name}" + (f" of the work pool {pool()}" if pool() != MERGES else "")


def worker_options(name: str, of: str) -> str:
    """Options of `prefect worker start` for the work queue of that name in the work pool `of`."""
    return f"--work-queue {name}" + ("" if of == MERGES else f" --pool {of}")
