"""The command line: thin verbs, one place that turns exceptions into a clear line and an exit code.

    leveret VERB thing key.path=value ... -o OUT

Exit codes: 0 done; 1 our fault (with a traceback and a request to report it); 2 usage or recipe; 3 data;
4 interrupted and resumable, Ctrl-C too; 5 environment (disk, memory, network, a missing extra).
A station is imported inside its verb, so `--help` is quick; a verb whose station is not installed does not appear.
`--json` puts one JSON object on stdout and everything else on stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from functools import cache
from types import FrameType
from typing import Any

import typer

from leveret.cli import ask, choose, examine, models, pools, studies, teach  # noqa: F401 (they register themselves)
from leveret.cli.common import NOUNS, app, coreset, pool, runs, study, tasks, world
from leveret.cli.faults import explain, say, say_our_fault

__all__ = ["app", "explain", "main", "run"]

ORDER = """
    quickstart embed condense train eval score compare convert merge push chat serve look show doctor
""".split()
"""In which `--help` lists the commands, in each of its panels."""

app.registered_commands.sort(key=lambda command: ORDER.index(str(command.name)))
_GROUPS = {"pool": pool, "coreset": coreset, "run": runs, "tasks": tasks, "study": study, "world": world}
for _name, _group in _GROUPS.items():
    if _group.registered_commands:
        app.add_typer(_group, name=_name, rich_help_panel=NOUNS)


@cache
def _command() -> Any:
    """All commands, once a process: a tenth of a second, which who calls `run` often would pay each time."""
    return typer.main.get_command(app)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code. Every exception ends here."""
    try:
        command = _command()
        # Not `command.main`: it has its own ideas about Ctrl-C and broken pipes.
        with command.make_context("leveret", list(args)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        if hasattr(error, "format_message") and hasattr(error, "show"):  # a usage error, of whichever click typer uses
            error.show(sys.stderr)
            return 2
        if isinstance(error, typer.Abort):
            error = KeyboardInterrupt()
        explained = explain(error)
        if explained is None:
            say_our_fault(error, args)
            return 1
        code, text = explained
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more as it ends; give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif text:
            if os.environ.get("LEVERET_TRACEBACK"):
                import traceback

                traceback.print_exception(error, file=sys.stderr)
            say(text)
        return code


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    code = 1
    # Registered first, so it runs last. What else an interpreter does at its end is to free every object one by one,
    # which takes most of a second once torch is there.
    atexit.register(lambda: _leave(code))
    signal.signal(signal.SIGTERM, _terminated)
    # Idle OpenMP threads sleep instead of spinning: no slower alone, and many times faster when cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A file or a terminal of another encoding (Windows' cp1252) must not end an answer.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second Ctrl-C while the first was being told
        code = 4
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nor may one cut short the end, and with it the exit code
    sys.exit(code)


def _leave(code: int) -> None:
    """Ends the process at once; what was said is out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)
