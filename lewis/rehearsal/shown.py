"""Lay out texts as files, with all that lies next to the originals."""

import os
from collections.abc import Mapping
from pathlib import Path


def show(texts: Mapping[str, str], root: Path, place: Path) -> dict[str, Path]:
    """Write texts as files whose neighbours are links to those of the originals.

    Args:
        texts: path of an original, from `root` -> the text that stands in for its content.
        root: a folder.
        place: a folder to be created. Nothing else is written to.

    Returns:
        The same paths -> the files.
    """
    originals = {name: Path(os.path.normpath(root / name)) for name in texts}
    if not originals:
        return {}
    top = Path(os.path.commonpath([path.parent for path in originals.values()]))
    found = {name: place / path.relative_to(top) for name, path in originals.items()}
    for name, file in found.items():
        folder, here = top, place
        for part in (*originals[name].relative_to(top).parent.parts, None):
            if not here.is_dir() or here.is_symlink():
                here.unlink(missing_ok=True)
                here.mkdir(parents=True)
                for each in folder.iterdir() if folder.is_dir() else ():
                    (here / each.name).symlink_to(each)
            if part is not None:
                folder, here = folder / part, here / part
        file.unlink(missing_ok=True)
        file.write_text(texts[name])
    return found
