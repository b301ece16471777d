"""Send commands to HAProxy by its runtime socket.

This module imports nothing of LEWIS: a part of `lewis up --serve` that runs for days uses it, and has to stay small.
"""

import socket
import time

_SECONDS = 10.0  # for one command and its whole answer


def ask(path: str, text: str) -> str:
    """Send commands to HAProxy, and return its answer.

    Args:
        path: of the socket.
        text: the commands, with `;` between them.

    Raises:
        OSError: if it does not answer in time.
    """
    end, answer = time.monotonic() + _SECONDS, bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(path)
        connection.sendall(f"{text}\n".encode())
        while part := connection.recv(65536):
            answer += part
            connection.settimeout(max(0.001, end - time.monotonic()))
    return answer.decode(errors="replace")
