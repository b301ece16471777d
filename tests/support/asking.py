"""Clients that ask a server all the time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def asking(ask: Callable[[int, int], str], *, clients: int, pause: float = 0.0) -> Iterator[list[str]]:
    """Meanwhile, clients ask; gives each answer, or the error with `error: ` before it.

    Args:
        ask: called with the number of the client and, from 1 on, of its request.
        clients: how many ask at once.
        pause: seconds between two requests of a client.
    """
    seen, over = list[str](), threading.Event()

    def client(own: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                seen.append(ask(own, number))
            except Exception as error:
                seen.append(f"error: {error}")
            time.sleep(pause)

    threads = [threading.Thread(target=client, args=(own,)) for own in range(clients)]
    for each in threads:
        each.start()
    try:
        yield seen
    finally:
        over.set()
        for each in threads:
            each.join()
