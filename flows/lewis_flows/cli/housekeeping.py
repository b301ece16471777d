"""`lewis gc`, `retention`, `backup`, `restore` and `verify`: free space, back up, and check the files."""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from lewis.errors import LewisError
from lewis.settings import size_text
from lewis_flows.cli.arguments import flag, option
from lewis_flows.cli.terminal import show_log

_YES = flag("--yes", "remove it; without this, only show it")
_DAYS = "keep what was used in the last N days (14)"
GC = option("--days", metavar="N", type=float, default=14.0, help=_DAYS), _YES
_OLD = "keep what ended or was written in the last N days (90)"
RETENTION = option("--days", metavar="N", type=float, default=90.0, help=_OLD), _YES
COPY = option("folder", metavar="DIR", type=Path, help="the copy, a folder outside of the store")


def gc(options: argparse.Namespace) -> None:
    """Show the entries of the store that are no longer needed, and with `--yes` remove them.

    Raises:
        InputError: if the service of this store has another MLflow than this environment names.
    """
    from lewis.registry.retention import by_versions
    from lewis.store import housekeeping, runs
    from lewis_flows.service.servers import check_mlflow_as_served
    from lewis_tasks.support import caching  # noqa: F401  adds Prefect's records to the kinds of entries

    show_log()
    check_mlflow_as_served()
    active_since = runs.active_since()  # asked first: what is used after this is kept, also if its run ends meanwhile
    found = housekeeping.survey(options.days, needed=by_versions(), active_since=active_since)
    freed, total = housekeeping.remove(found) if options.yes else 0, sum(item.bytes for item in found)
    if options.json:
        facts = {"found": [asdict(item) for item in found], "bytes": total, "removed": options.yes, "freed": freed}
        print(json.dumps(facts, indent=2, default=str))
        return
    for item in found:
        print(f"{item.bytes / 1e6:10.3f} MB  {item.path}: {item.why}")
    done = f"{size_text(freed)} freed" if options.yes else f"{size_text(total)}; `lewis gc --yes` removes them"
    print(f"{len(found)} entries, {done}" if found else "nothing to remove")


def retention(options: argparse.Namespace) -> None:
    """Show old data that nothing needs in Prefect, MLflow and the store's remote half; with `--yes` remove it.

    Raises:
        InputError: if the days are wrong, or the service of this store has another MLflow than this environment names.
    """
    from lewis.store import outdated
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import check_mlflow_as_served, prefect_server

    show_log()
    outdated.check_days(options.days)  # before a server is started for it
    check_mlflow_as_served()
    with prefect_server() as url, connected(url):
        from lewis_flows import retention

        found = retention.survey(options.days)
        if options.yes:
            retention.remove(found)
    if options.json:
        facts = {"found": [asdict(each) for each in found], "removed": options.yes}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for each in found:
        print(f"{each.where}: {each.what}, of {datetime.fromtimestamp(each.time, UTC).date()}")
    print(retention.to_text(found, removed=options.yes))


def backup(options: argparse.Namespace) -> None:
    """Copy the data that cannot be recomputed to a folder."""
    from lewis_flows.backup import backup

    done = backup(options.folder)
    if options.json:
        print(json.dumps(done._asdict(), indent=2, default=str))
        return
    print(f"{done.folder}: {done.files} files, {size_text(done.bytes)}; it holds the secrets: keep it as you keep them")
    for part, url in done.elsewhere.items():
        print(f"{part} is at {url}: copy its database{' and artifacts' if part == 'mlflow' else ''} there")
    for part, place in done.missing.items():
        print(f"{part} has no database in {place}: if its server has it elsewhere, set the server's variables here too")


def restore(options: argparse.Namespace) -> None:
    """Put a copy that `lewis backup` made back into an empty store."""
    from lewis_flows.backup import restore

    done = restore(options.folder)
    if options.json:
        print(json.dumps(done._asdict(), indent=2, default=str))
        return
    print(f"{done.files} files, {size_text(done.bytes)} are back; start `lewis up`")


def verify(options: argparse.Namespace) -> None:
    """Read and check all entries of the store and all registered versions, and print what is damaged.

    Raises:
        LewisError: if something is damaged.
    """
    from lewis.registry.repair import verify
    from lewis_tasks.support import caching  # noqa: F401  adds Prefect's records to the kinds of entries

    show_log()
    found = verify()
    if options.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print(f"checked {found.checked} entries and versions, {len(found.damaged)} damaged{found.left_out}")
        print("".join(f"{each.kind} {each.entry}: {each.why}\n" for each in found.damaged), end="")
    if found.damaged:
        raise LewisError(found.to_text())
