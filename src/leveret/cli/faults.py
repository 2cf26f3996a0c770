"""Exceptions become one line for a person and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from leveret.runs import DataError, EnvironmentFault, UserError

_EXTRAS = {
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "ray": "ray",
    "tensorboard": "track",
    "wandb": "track",
    "bitsandbytes": "quant",
    "gguf": "gguf",
}
_NETWORK = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp")
_AGAIN = "interrupted; where a folder was being filled, the same command goes on from what is finished there"


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line for a person; None when the fault is ours."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 4, _AGAIN
    if isinstance(error, BrokenPipeError):
        return 4, ""  # whoever read our output has gone; there is nobody to tell
    if any(kind.__name__ == "StrictDataclassError" for kind in type(error).__mro__):  # how transformers reads configs
        return DataError.exit_code, f"a model's config.json holds what it may not: {' '.join(str(error).split())}"
    homes = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if homes & set(_NETWORK):
        return EnvironmentFault.exit_code, f"the model hub or the network did not answer as hoped: {_first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "leveret":
        package = error.name.partition(".")[0]
        extra = _EXTRAS.get(package)
        mend = f"pip install 'leveret[{extra}]'" if extra else "install leveret again: pip install leveret"
        return EnvironmentFault.exit_code, f"the package {package!r} is not installed. To mend it: {mend}"
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return _explain_os(error)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return EnvironmentFault.exit_code, f"no connection: {_first_line(error)}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            EnvironmentFault.exit_code,
            f"out of memory: {_first_line(error)}. A smaller batch or micro_batch needs less.",
        )
    if type(error).__name__ == "BrokenProcessPool":
        return (
            EnvironmentFault.exit_code,
            "a worker process was killed, most often for want of memory; try fewer workers",
        )
    return None


def _explain_os(error: OSError) -> tuple[int, str]:
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault.exit_code, f"the disk is full{where}. Free some space and run the same command again."
    if error.errno == errno.EFBIG:
        return EnvironmentFault.exit_code, (
            f"the file would be larger than may be written here{where}. `ulimit -f` and the disk's file system say how "
            "large that is; raise it, or name another folder with -o."
        )
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) and error.filename:
        return DataError.exit_code, f"{(error.strerror or 'not usable').lower()}{where}"
    if isinstance(error, FileExistsError) and error.filename:
        return DataError.exit_code, f"a file of that name is there{where}; give another, or move it away"
    if isinstance(error, PermissionError):
        return EnvironmentFault.exit_code, f"not allowed{where} ({error.strerror})"
    return EnvironmentFault.exit_code, f"{_first_line(error)}{where if error.strerror is None else ''}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def say(text: str) -> None:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    head = "\033[31merror:\033[0m" if colour else "error:"
    print(f"{head} {text}", file=sys.stderr, flush=True)


def say_our_fault(error: BaseException, args: Sequence[str]) -> None:
    import platform
    import shlex
    import traceback

    from leveret import __version__

    traceback.print_exception(error, file=sys.stderr)
    say(
        "this is a fault in leveret, not in what you gave. Please report it with the lines above, and with:\n"
        f"  leveret {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"  leveret {shlex.join(args)}"
    )
