"""Makes the small store that tests keep, of the format that the store has now: it stays as later versions find it.

    python -m tests.support.old_store

writes `tests/lewis/store/store_<FORMAT>.tar.gz`: `home`, a store with an entry of each kind that a merge makes, and
`references.json`, what Prefect remembers of them; the path of the store in it is `HOME`. Do not make it again when the
code changes: run this once for each new format.
"""

import json
import os
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "lewis" / "store"
_OF_ONE_DISK = ("home/locks", "home/digests")
RECIPE = """
merge_method: %s
base_model: ./base
models: [{model: ./math}, {model: ./code}]
lewis:
  calibrations: {sums: {texts: ["w1 w2 w3", "w4 w5 w6 w7"], samples: 2}}
%s
"""


def make(folder: Path) -> dict[str, list[object]]:
    """Merge tiny models in `folder`, whose store is `folder/home`; gives the references by their class."""
    from lewis.inspection import step as inspection
    from lewis.recipe.recipe import Recipe
    from lewis.store import writable
    from tests.support import pipeline
    from tests.support.models import write_expert, write_llama

    base = write_llama(folder / "base", layers=1, hidden=4)
    for seed, name in enumerate(("math", "code"), 1):
        write_expert(base, folder / name, seed=seed)
    writable.check_format()
    found: dict[str, list[object]] = {}
    for method, more in (("ties", "  prune_by: activation"), ("regmean", "")):
        recipe = Recipe.parse(RECIPE % (method, more), root=folder)
        files, experts = pipeline.fetch(recipe)
        assert files is not None
        measured, allocated = pipeline.guide(recipe, files, experts)
        sets = [pipeline.prepare_calibration(recipe, "sums", files)]
        merged = pipeline.merge(recipe, files, experts, allocated)
        for each in (*measured, *sets, allocated, merged):
            if each is not None:
                found.setdefault(type(each).__name__, []).append(each.model_dump(mode="json"))
        inspection.inspect(inspection.InspectionInput(files, tuple(experts)))
    return found


def main() -> None:
    """Write the archive."""
    from lewis.store.writable import FORMAT

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        os.environ["LEWIS_HOME"] = str(home)
        text = json.dumps(make(Path(scratch)), indent=1).replace(str(home), "HOME")
        (Path(scratch) / "references.json").write_text(text)
        with tarfile.open(ROOT / f"store_{FORMAT}.tar.gz", "w:gz") as archive:
            archive.add(Path(scratch) / "references.json", "references.json")
            archive.add(home, "home", filter=lambda each: None if each.name in _OF_ONE_DISK else each)


if __name__ == "__main__":
    main()
