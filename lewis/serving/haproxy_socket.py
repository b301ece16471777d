"""Send commands to HAProxy by its runtime socket.

This module imports nothing of LEWIS: a part of `lewis up --serve` that runs for days uses it, and has to stay small.
"""

import socket

_SECONDS = 10.0  # for one command


def ask(path: str, text: str) -> str:
    """Send commands to HAProxy, and return its answer.

    Args:
        path: of the socket.
        text: the commands, with `;` between them.

    Raises:
        OSError: if it does not answer.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(path)
        connection.sendall(f"{text}\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode(errors="replace")
