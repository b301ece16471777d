"""Output that all commands have in common: log messages, errors, tables, and a safe stdout."""

import errno
import io
import logging
import os
import re
import select
import stat
import sys
from collections.abc import Mapping, Sequence

from lewis.redact import visible
from lewis_flows import json_logs

SIGPIPE = 141
"""The exit code if the program that reads the output, such as `head`, has ended: as of a process killed by SIGPIPE."""
STOPPED = "stopped; finished steps are kept, run the same command to go on"
"""What a command says when Ctrl-C ends it."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DRAWN = re.compile(r"(\x1b\[[0-9;]*m|\x1b\[2J\x1b\[H)")


class Terminal(logging.Handler):
    """Log handler that writes to the current `sys.stderr`, so that messages appear above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def say_error(text: str, *, as_json: bool = False) -> None:
    """Print on stderr why a command ends."""
    record = logging.LogRecord("lewis", logging.ERROR, "", 0, text, (), None)
    print(json_logs.line_of(record) if as_json else f"lewis: {visible(text)}", file=sys.stderr)


class Visible(io.TextIOWrapper):
    """A text output that escapes control characters, except those that commands use: colours, clearing the screen."""

    def __init__(self, out: io.TextIOWrapper) -> None:
        out.flush()
        buffering = 0 if out.write_through else -1  # PYTHONUNBUFFERED
        super().__init__(
            open(out.fileno(), "wb", buffering, closefd=False),  # noqa: SIM115  # as long as the process
            out.encoding,
            "backslashreplace",
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )
        self._out = out  # which closes the file when nothing refers to it

    def write(self, text: str) -> int:
        """Write a text with other control characters, and characters that the encoding lacks, as escapes."""
        parts = _DRAWN.split(text)
        super().write("".join(part if i % 2 else visible(part) for i, part in enumerate(parts)))
        return len(text)


def show_controls() -> None:
    """Make stdout show control characters as escapes, since names in other people's models may contain them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Visible(sys.stdout)


def open_closed() -> None:
    """Open standard streams that the caller closed (`>&-`) as the null device, for child processes too.

    Else the next file that such a process opens would take the place of the stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115  # as long as the process
            os.set_inheritable(null.fileno(), null.fileno() == number)
            setattr(sys, name, null)


def output_is_file() -> bool:
    """Whether the shell sends the output into a file (`> FILE`)."""
    try:
        return stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError):  # no descriptor
        return False


def nobody_reads() -> bool:
    """Whether the program that reads the output has ended; if so, what is still to be written is dropped."""
    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains when it writes the rest at its end
    return True


def output_is_full(error: OSError) -> bool:
    """Whether an error means that there is no room where the output goes; what is still to be written is dropped then.

    An error that names a file is about that file, not the output.
    """
    if error.filename is not None or error.errno not in _FULL:
        return False
    try:
        os.write(1, b"\n")  # what Python holds may be written already
    except OSError as found:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains when it writes the rest at its end
        return found.errno in _FULL
    return False


def show_log() -> None:
    """Show the messages of `lewis`; for commands without Prefect, which has handlers of its own."""
    handler = json_logs.JsonLines() if json_logs.is_json() else Terminal()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lewis").setLevel(logging.INFO)


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows that have the same keys; if one key is `metric`, a table for each metric, under its name."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 132
    for metric in dict.fromkeys(str(row.get("metric", "")) for row in rows):
        table = Table(title=Text(metric) if metric else None, title_justify="left", box=box.SIMPLE_HEAD)
        shown = [{k: v for k, v in row.items() if k != "metric"} for row in rows if row.get("metric", "") == metric]
        for name in shown[0]:
            table.add_column(Text(name), overflow="fold")
        for row in shown:
            # As `Text`, a name with brackets is no markup.
            table.add_row(*(Text(visible(str(value))) for value in row.values()))
        with console.capture() as text:  # if the reader has ended, `print` raises, but a console would exit
            console.print(table)
        print(text.get(), end="")
