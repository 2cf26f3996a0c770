"""What every command that makes something needs: errors with exit codes, atomic files, run folders, progress,
a soft stop.

Nothing here knows what is being made. Nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, ClassVar

# --- errors for people ----------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something a person can mend. The text says what was given, what is allowed, where from, and how to mend it."""

    exit_code: ClassVar[int] = 2


class RecipeError(UserError):
    """A recipe, an override or an argument is not usable."""

    exit_code: ClassVar[int] = 2


class DataError(UserError):
    """Data on disk is missing, malformed, or too much of it is."""

    exit_code: ClassVar[int] = 3


class Interrupted(UserError):
    """Stopped as asked. Everything needed to go on is saved; the same command continues."""

    exit_code: ClassVar[int] = 4


class EnvironmentFault(UserError):
    """The machine cannot do it: disk, memory, network, a missing package."""

    exit_code: ClassVar[int] = 5


def in_words(reasons: Mapping[str, int]) -> str:
    """How many samples were refused why, the most frequent first."""
    some = Counter(reasons).most_common(8)
    return "; ".join([*(f"{count:,} {reason}" for reason, count in some), *["..."] * (len(reasons) > len(some))])


def in_bytes(size: float) -> str:
    """Bytes for people: `412 MiB`, `3.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def bytes_of(text: str) -> int:
    """Bytes that a person wrote as `3GB`, `500 MiB` or `1000000`. RecipeError says what is allowed."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"{text!r} is no amount of memory; write it as 3GB, 500MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def closest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that look like `name`, the likeliest first; for "did you mean"."""
    folded: dict[str, str] = {}
    for known in names:
        folded.setdefault(str(known).lower(), str(known))
    wanted = str(name).lower()
    found = difflib.get_close_matches(wanted, folded, n=3, cutoff=0.55)
    # Ids are hierarchical ("bunny/v1.0-3b"): what holds the given word, or lies in it, is near however long it is.
    holding = [key for key in folded if len(wanted) > 2 and (wanted in key or (len(key) > 2 and key in wanted))]
    return [folded[key] for key in dict.fromkeys([*found, *holding])][:3]


# --- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to write bytes into, piece by piece; a reader, or a crash at any moment, sees the old file at `path` or
    the new one, never a part.

    A temporary file in the same folder is written, and when the block ends it is synced and renamed; then the folder
    is synced, so that the rename itself survives a power cut. Missing folders are made.

    sync  False leaves it to the system when bytes reach the disk: a killed process still leaves all or nothing, but
          after a power cut the file may be short. For large files that can be made again, whose size is checked.

    Raises:
        OSError: the disk's own fault (full, read-only), with the file's name. At any error of the block the temporary
            file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The dot keeps it out of globs; the name is unguessable because several processes may write the same file.
    temporary = path.parent / f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _name_file(error, path)
        raise
    if sync:
        sync_folder(path.parent)


_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Faults that only writing meets."""


def _name_file(error: BaseException, path: Path) -> None:
    """The system does not say into which file a write failed; whoever mends it wants to know."""
    if isinstance(error, OSError) and error.errno in _WRITING and error.filename is None:
        error.filename = str(path)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data`, whole or not at all, as `atomic_file` does. Text is UTF-8 with the line ends it has."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def sync_folder(folder: str | Path) -> None:
    """Make renames inside `folder` survive a power cut, where the system allows it."""
    with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_folder(source: Path, target: Path) -> None:
    """The folder `source` once more as `target`, in place of what is there, whole or not at all; its files are hard
    links, which take no room, or copies where the file system has none."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    writing = target.with_name(f".writing-{target.name}")
    shutil.rmtree(writing, ignore_errors=True)
    shutil.copytree(source, writing, copy_function=link)
    shutil.rmtree(target, ignore_errors=True)
    writing.rename(target)
    sync_folder(target.parent)


_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ENODEV", "ENXIO", "ESTALE")
    if hasattr(errno, name)
}
_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


@contextlib.contextmanager
def disk_faults(where: str | Path, mend: str) -> Iterator[None]:
    """Turn a disk that is full, read-only or broken into an EnvironmentFault that names the file and how to go on.

    Also where a library written in Rust, or the copying of a folder, says so in words alone. Other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        if number is None and (found := _IN_WORDS.search(str(error))):
            number = int(found[1] or found[2])
        if number is None or number not in _DISK:
            raise
        told = os.strerror(number).lower()
        file = getattr(error, "filename", None)
        words = f"{told}: {file}" if file else told
        raise EnvironmentFault(f"{where}: the disk failed ({words}). {mend}") from error


def _plain(value: Any) -> Any:
    """What json cannot write itself: paths, arrays and scalars of numpy or torch, dataclasses, sets."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r:.80}")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, so that any reader can read the file."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _finite(_plain(value))


def _dumps(obj: Any, **options: Any) -> str:
    return json.dumps(_finite(obj), ensure_ascii=False, allow_nan=False, default=_plain, **options)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as readable JSON, atomically. NaN and infinities become null."""
    atomic_write(path, _dumps(obj, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; DataError says which file, line and column is wrong, or that it is not there."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{path}: not UTF-8 text (byte {fault.start})") from None
    except json.JSONDecodeError as fault:
        raise DataError(f"{path}: not JSON: {fault.msg} at line {fault.lineno}, column {fault.colno}") from None


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Add one line, in one write: a killed process leaves whole lines, or one torn last line."""
    path = Path(path)
    line = (_dumps(obj) + "\n").encode("utf-8")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        while line:
            line = line[os.write(handle, line) :]
    except OSError as error:
        _name_file(error, path)
        raise
    finally:
        os.close(handle)


def each_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file, one at a time. A torn last line (a killed writer's) is dropped; any other fault
    is a DataError.

    A last line counts as torn when it has no line end and is not JSON.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as fault:
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}, line {number}: not JSON ({fault}): {line[:60].strip()!r}") from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a JSON lines file, as `each_jsonl` reads them."""
    return list(each_jsonl(path))


def repair_jsonl(path: str | Path) -> int:
    """Cut a torn last line, so that appending may go on; returns how many bytes were cut. A missing file is fine."""
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        start = size
        while start and b"\n" not in tail:
            step = min(65536, start)
            start -= step
            file.seek(start)
            tail = file.read(step) + tail
        last = tail.rpartition(b"\n")[2]
        if not last:
            return 0
        try:
            json.loads(last)
        except ValueError:
            file.truncate(size - len(last))
            return len(last)
        file.seek(0, os.SEEK_END)
        file.write(b"\n")  # a whole record whose line end was lost
        return 0


def sha256_of(obj_or_path: Any) -> str:
    """Hex SHA-256. A Path: the file's bytes (a folder: the sorted names and bytes of its files). bytes: themselves.
    Anything else, strings included: its JSON with sorted keys, so that equal recipes have equal hashes."""
    digest = hashlib.sha256()
    if isinstance(obj_or_path, Path):
        if obj_or_path.is_dir():
            for file in sorted(path for path in obj_or_path.rglob("*") if path.is_file()):
                name = file.relative_to(obj_or_path).as_posix()
                digest.update(f"{name}\n{sha256_of(file)}\n".encode())
            return digest.hexdigest()
        with open(obj_or_path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    data = obj_or_path if isinstance(obj_or_path, bytes) else _dumps(obj_or_path, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


# --- what this ran on -----------------------------------------------------------------------------------------------

_PACKAGES = (
    "leveret", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "pillow", "pyarrow",
    "numpy", "scipy", "pydantic", "PyYAML", "typer", "rich", "jinja2", "fastapi", "uvicorn", "ray", "tensorboard",
    "wandb", "bitsandbytes", "gguf",
)  # fmt: skip


def cores() -> int:
    """Cores this process may use, which in a container or under taskset is fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Python, platform, versions of the packages that matter (none is imported), cores, the checkout's git state."""
    import platform
    from importlib import metadata

    from leveret import __version__

    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["leveret"] = __version__  # a source tree on the path has no metadata, or another version's
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "packages": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    import subprocess

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


# --- run folders ----------------------------------------------------------------------------------------------------


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by key path: {"a": {"b": [1]}} -> {"a.b.0": 1}. Empty mappings and lists are leaves too."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


_MISSING = object()


def differences(old: Any, new: Any) -> list[str]:
    """One line per key path whose value differs, in the order of the keys: `a.b: 1 there, 2 now`."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        there, now = before.get(key, _MISSING), after.get(key, _MISSING)
        if there != now:
            lines.append(f"{key}: {_shown(there)} there, {_shown(now)} now")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"fingerprint {value[:10]}"
    return "nothing" if value is _MISSING else _dumps(value)[:80]


_DIGEST = re.compile("[0-9a-f]{16,}")
"""Fingerprints of data and weights in a recipe: nobody compares them by eye to the last letter."""


_LOCKS: dict[str, IO[str]] = {}  # open for the life of the process: closing the file would drop the lock


def claim(path: Path) -> None:
    """Make a folder, and keep other processes out while this one lives. The system drops the lock, even after kill -9.

    Raises EnvironmentFault where another process holds the folder, or where it may not be written.
    """
    rights = f"{path}: no right to write in this folder. Change its rights, or name another with -o."
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise EnvironmentFault(rights) from None
    try:
        import fcntl
    except ImportError:
        return
    key = str(path.resolve())
    if key in _LOCKS and (path / ".lock").exists():
        return
    try:
        file = open(path / ".lock", "a+", encoding="utf-8")
    except PermissionError:
        raise EnvironmentFault(rights) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        raise EnvironmentFault(
            f"{path}: another process is writing this folder. Wait for it, stop it, or name another folder with -o."
        ) from None
    except OSError:
        return  # a file system without locks
    _LOCKS[key] = file


def is_held(path: Path) -> bool:
    """Whether a process, this one too, has claimed the folder. Asking takes no lock, so it disturbs nobody."""
    if str(path.resolve()) in _LOCKS:
        return True
    try:
        import fcntl
        import struct

        with open(path / ".lock", "rb+") as file:
            # struct flock: (type, whence, start, length, pid) on Linux, (start, length, pid, type, whence) on macOS
            form, place = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi", 0)
            asked = [0, 0, 0, 0, 0]
            asked[place] = fcntl.F_WRLCK
            told = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *asked)))
            return told[place] != fcntl.F_UNLCK
    except (ImportError, OSError):
        return False


def _fixed(free: Collection[str], *recipes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes without the fields that may differ."""
    return [{key: value for key, value in recipe.items() if key not in free} for recipe in recipes]


def kept_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that a run wrote into its folder. DataError where the file is damaged."""
    import yaml

    file = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text("utf-8"))
        if isinstance(recipe, dict):
            return recipe
        why = "it holds no fields"
    except UnicodeDecodeError as fault:
        why = f"not UTF-8 text (byte {fault.start})"
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        why = "not YAML" + (f" at line {mark.line + 1}, column {mark.column + 1}" if mark else "")
    raise DataError(
        f"{file} is damaged: {why}. The run wrote it and needs it to go on: bring it back from a copy, or name another "
        "folder with -o and begin anew"
    )


class RunFolder:
    """A folder that one command fills: its resolved recipe, what it ran on, its metrics, and which steps are done.

    recipe.yaml        the resolved recipe; opening the folder with another one is refused
    environment.json   python, packages, cores, git state; later openings elsewhere are listed in it
    metrics.jsonl      one line per `log`
    done/<step>.json   one file per finished step, for resume
    """

    def __init__(self, path: Path, kind: str, *, fresh: bool = False) -> None:
        """fresh: whether the folder was empty until now, so that all in it is this run's."""
        self.path = path
        self.kind = kind
        self.fresh = fresh

    @classmethod
    def open(cls, path: str | Path, kind: str, recipe: Mapping[str, Any], free: Collection[str] = ()) -> RunFolder:
        """Make the folder, or open it again to go on with the same `kind` of run under the same recipe.

        free  fields of the recipe (of its top) that may be others than the folder was begun with; it keeps those.

        Raises:
            RecipeError: the folder holds another kind of run, another recipe (the text names every field that
                differs), or files that are no run.
            DataError: the recipe in it is damaged.
            EnvironmentFault: another process is writing in it, or it may not be written.
        """
        import yaml

        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; the output of `{kind}` is a folder. Name another with -o.")
        claim(path)
        wanted = json.loads(_dumps(recipe))
        recipe_file = path / "recipe.yaml"
        fresh = not any(item.name != ".lock" for item in path.iterdir())
        if recipe_file.exists():
            cls._check_same(path, kind, *_fixed(free, kept_recipe(path), wanted))
        else:
            # environment.json alone is what a kill between the two writes below leaves: no stranger.
            known = {"environment.json"}
            if strangers := sorted(i.name for i in path.iterdir() if i.name not in known and i.name[0] != "."):
                raise RecipeError(
                    f"{path} is not empty and holds no run (it holds {', '.join(strangers[:5])}"
                    f"{', ...' if len(strangers) > 5 else ''}). Name a new or empty folder with -o."
                )
            write_json(path / "environment.json", {"kind": kind, **environment(), "resumed": []})
            # The recipe comes last: a folder that has it is whole.
            atomic_write(recipe_file, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True, width=120))
        repair_jsonl(path / "metrics.jsonl")
        return cls(path, kind, fresh=fresh)

    @classmethod
    def peek(cls, path: str | Path, kind: str, recipe: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """Which steps are done in a folder, without opening it. RecipeError where `open` would refuse the recipe."""
        path = Path(path)
        if not (path / "recipe.yaml").exists():
            return []
        cls._check_same(path, kind, *_fixed(free, kept_recipe(path), json.loads(_dumps(recipe))), look=True)
        return sorted(mark.stem for mark in (path / "done").glob("*.json"))

    @classmethod
    def adopt(cls, path: str | Path, kind: str, recipe: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """Make another recipe the folder's own, so that `open` takes it; the lines say what differs. For those who were
        told to go on all the same. Another kind of run is refused as ever."""
        import yaml

        path = Path(path)
        if not (path / "recipe.yaml").exists():
            return []
        claim(path)
        there, wanted = kept_recipe(path), json.loads(_dumps(recipe))
        cls._check_same(path, kind, there, there, look=True)
        if lines := differences(*_fixed(free, there, wanted)):
            atomic_write(path / "recipe.yaml", yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True, width=120))
        return lines

    @staticmethod
    def _check_same(path: Path, kind: str, there: Any, wanted: Any, *, look: bool = False) -> None:
        record = read_json(path / "environment.json")
        if record.get("kind") != kind:
            raise RecipeError(f"{path} holds a `{record.get('kind')}` run, not `{kind}`. Name another folder with -o.")
        if lines := differences(there, wanted):
            shown = "".join(f"\n  {line}" for line in lines[:20])
            more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
            if all(": fingerprint " in line for line in lines):
                what, old = "other data or another model", "what it was begun with"
            else:
                what, old = "another recipe", f"the old recipe ({path / 'recipe.yaml'})"
            raise RecipeError(
                f"{path} was made with {what}:{shown}{more}\n"
                f"Name another folder with -o, delete this one, or give {old} to go on with it."
            )
        if look:
            return
        now = environment()
        seen = [record, *record["resumed"]]
        if all(differences({key: old.get(key) for key in now}, now) for old in seen):
            record["resumed"].append(now)
            write_json(path / "environment.json", record)

    def log(self, **metrics: Any) -> None:
        """Add one line to metrics.jsonl. Numbers that are not finite become null."""
        append_jsonl(self.path / "metrics.jsonl", metrics)

    def done(self, name: str, **facts: Any) -> None:
        """Mark a step as finished, with facts worth keeping. Call it after the step's files are in place."""
        write_json(self._mark(name), {"step": name, **facts})

    def is_done(self, name: str) -> bool:
        return self._mark(name).exists()

    def facts(self, name: str) -> dict[str, Any]:
        """What `done` was given for a finished step; DataError when it is not finished."""
        return read_json(self._mark(name))

    def _mark(self, name: str) -> Path:
        return self.path / "done" / f"{name}.json"


# --- progress -------------------------------------------------------------------------------------------------------

_PLAIN_EVERY = 10.0


class Progress:
    """How far a loop is, on stderr: a bar on a terminal, a line every ten seconds elsewhere.

        with Progress(len(items), "embedding", "images") as progress:
            for item in items:
                progress.advance(1, cached=hits)

    `total` may be None when it is not known. What `advance` is given by name is shown behind the throughput.
    """

    def __init__(self, total: int | None, what: str, unit: str = "") -> None:
        self.total, self.what, self.unit = total, what, unit
        self.count = 0
        self._shown: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[tail]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, tail="")
        return self

    def advance(self, n: int = 1, **shown: Any) -> None:
        self.count += n
        self._shown.update(shown)
        if self._bar is not None:
            self._bar.update(self._task, advance=n, tail=self._tail())
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_EVERY:
            self._last = now
            print(self._line(now), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif kind is None and self.count:
            print(self._line(time.monotonic(), finished=True), file=sys.stderr, flush=True)

    def _rate(self, now: float) -> float:
        return self.count / max(now - self._start, 1e-9)

    def _tail(self) -> str:
        words = [f"{_brief(self._rate(time.monotonic()))} {self.unit}/s" if self.unit else ""]
        words += [f"{name} {_brief(value)}" for name, value in self._shown.items()]
        return "  ".join(word for word in words if word)

    def _line(self, now: float, finished: bool = False) -> str:
        of = f" of {self.total:,}" if self.total is not None else ""
        line = f"{self.what}: {self.count:,}{of} {self.unit}".rstrip() + f"  {self._tail()}"
        if finished:
            return f"{line}  done in {_clock(now - self._start)}"
        if self.total and self.count:
            line += f"  {_clock((self.total - self.count) / self._rate(now))} left"
        return line


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


# --- a soft stop ----------------------------------------------------------------------------------------------------


class _Stop:
    """The state behind `graceful_stop`: how deep we are, and whether a stop was asked for."""

    depth = 0
    asked = False


def stop_requested() -> bool:
    """Whether SIGTERM or Ctrl-C came inside `graceful_stop`. A loop that sees it saves and raises Interrupted."""
    return _Stop.asked


@contextlib.contextmanager
def graceful_stop() -> Iterator[None]:
    """Turn the first SIGTERM or Ctrl-C into a flag that `stop_requested` reads; a second one stops at once.

    May be nested, and does nothing off the main thread. A request that the body never polled is not lost: leaving
    the outermost block raises Interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if _Stop.asked:
            raise KeyboardInterrupt
        _Stop.asked = True
        print("stopping as soon as the work is saved; once more to stop at once", file=sys.stderr, flush=True)

    if _Stop.depth == 0:
        _Stop.asked = False
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    _Stop.depth += 1
    try:
        yield
        if _Stop.depth == 1 and _Stop.asked:
            raise Interrupted("stopped as asked; run the same command again to go on")
    finally:
        _Stop.depth -= 1
        if _Stop.depth == 0:
            _Stop.asked = False
            for number, handler in previous.items():
                signal.signal(number, handler)
