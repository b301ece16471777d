"""What disks and processes do to a file: cut it, flip a bit of it, leave nothing in it."""

import os
from pathlib import Path

DAMAGES = ("cut", "flipped", "emptied")


def damage(path: Path, how: str) -> None:
    """Damage a file in place, in its own inode; `how` is one of `DAMAGES`."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
    else:
        del data[len(data) // 2 if how == "cut" else 0 :]
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, bytes(data))
    finally:
        os.close(descriptor)
