"""`lewis compare`: two models on the same documents."""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis.errors import InputError, LewisError
from lewis_flows.cli.arguments import option
from lewis_flows.cli.terminal import print_table

if TYPE_CHECKING:
    from lewis.evaluation.paired import Side

_VERSION = re.compile(r"(models:/)?[^/:@]+(/\d+|@[\w-]+)")


_MODEL = (
    "a model that was scored here (a folder or org/name), a version (NAME/3, NAME@champion), or a folder that lm-eval "
    "wrote with --log_samples"
)
MODELS = (
    option("a", metavar="A", help=f"what the other is compared with: {_MODEL}"),
    option("b", metavar="B", help=f"what is compared: {_MODEL}"),
)


def compare(options: argparse.Namespace) -> None:
    """Print the paired table: how much B gains on A, its interval, wins and losses, p and Holm's p."""
    from lewis.evaluation.paired import paired

    first, second = _side(options.a), _side(options.b)
    if first.label == second.label:
        first, second = replace(first, label=f"{first.label} (A)"), replace(second, label=f"{second.label} (B)")
    found = paired(first, second)
    missing = {
        of.label: [key for key in of.keys if key not in other.keys] for of, other in ((first, second), (second, first))
    }
    aside = list(dict.fromkeys([*first.without_documents, *second.without_documents]))
    if options.json:
        rows = [each.to_json() for each in found]
        found_of_both = {"rows": rows, "only": missing, "without_documents": aside}
        print(json.dumps({"a": first.label, "b": second.label, **found_of_both}, indent=2))
        return
    print_table([each.to_row(first.label, second.label) for each in found])
    for name, keys in missing.items():
        if keys:
            print(f"only {name} has {', '.join(keys)}")
    if aside:
        print(f"not compared, for they have no value per document: {', '.join(aside)}")
    for each in found:
        if each.prompts:
            of = f"{each.prompts} of {each.comparison.documents} documents"
            print(f"{each.comparison.key}: the prompts of {of} differ, by the chat template, the examples or the task")


def _side(given: str) -> "Side":
    """Find the scores of the model, version or folder that a command line names; InputError if there are none."""
    from lewis.evaluation.paired import Side, scored_keys_of_adapter
    from lewis.evaluation.results_folder import holds_results, read_results
    from lewis.models.hub.repository import resolve
    from lewis.models.lora.expert import is_adapter
    from lewis.models.source import pin
    from lewis.store import read_manifest

    folder = Path(os.path.expanduser(given))  # pathlib raises for a user that does not exist
    label = folder.resolve().name if folder.is_dir() else given
    if holds_results(folder):
        return Side(label, [("", read_results(folder))])
    if not folder.exists() and _VERSION.fullmatch(given):
        return Side.of_store(given, {_digest(given)})
    if folder.is_file() and folder.name.startswith("results_"):
        raise InputError(f"{given}: expected the folder that lm-eval wrote, got a file; give {folder.parent}")
    merge = (read_manifest(folder) if folder.is_dir() else None) or {}
    keys = {str(merge["digest"])} if "digest" in merge else set()
    if not keys and is_adapter(folder) and (scored := scored_keys_of_adapter(resolve(given, Path.cwd()).commit)):
        if len(scored) > 1:
            raise InputError(f"{given}: was scored on {len(scored)} models; name the one that you mean: BASE+{given}")
        return Side.of_store(label, scored)
    try:
        keys.add(pin(given, Path.cwd()).key)
    except LewisError as error:
        if keys:  # an adapter of a merge, which is no model without its base
            return Side.of_store(label, keys)
        what = "has no results_*.json of lm-eval" if folder.is_dir() else "is no folder"
        raise InputError(f"{error}; and {folder} {what}") from error
    return Side.of_store(label, keys)


def _digest(given: str) -> str:
    """Return the digest of the merge that a registered version holds."""
    from lewis.registry import tracking
    from lewis.registry.pull import version_of
    from lewis.registry.versions import digest_in

    tracking.check_exists(given)
    with tracking.client(f"looking for {given}") as client:
        try:
            return digest_in(version_of(client, given).tags)
        except InputError as error:
            raise InputError(f"{error}; and there is no folder of this name") from error
