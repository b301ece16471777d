"""PNG files: whether one is whole, by the checksum that each of its chunks carries."""

import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def is_whole(data: bytes) -> bool:
    """Whether these are all bytes of a PNG file, as they were written."""
    if not data.startswith(_SIGNATURE):
        return False
    start, kind = len(_SIGNATURE), b""
    while kind != b"IEND" and start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        kind, stop = data[start + 4 : start + 8], start + 8 + length
        if zlib.crc32(data[start + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            return False
        start = stop + 4
    return kind == b"IEND" and start == len(data)
