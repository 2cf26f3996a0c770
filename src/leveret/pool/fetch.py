"""One file from the net: gone on with where it stopped, tried again, and checked before it gets its name.

PATH.part        what has come so far
PATH.part.json   which version of the file that is part of
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from leveret.runs import (
    DataError,
    EnvironmentFault,
    Interrupted,
    in_bytes,
    read_json,
    stop_requested,
    sync_folder,
    write_json,
)

CHUNK = 1 << 20
TRIES = 6
"""In a row without a single byte; a server that breaks off now and then may do so for ever."""

_AGAIN = (408, 425, 429)
"""Answers of the 4xx kind that may be another one later."""

Told = Callable[[int], None]
"""Called with the bytes that came since the last call; less than 0 where what was there is given up."""


def _quiet(_: int) -> None:
    pass


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def begun(path: Path) -> int:
    """Bytes of a file that has not wholly come."""
    part, hub = part_of(path), hub_folder(path)
    if part.is_file():
        return part.stat().st_size
    return sum(file.stat().st_size for file in hub.rglob("*.incomplete")) if hub.is_dir() else 0


def fetch(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    told: Told = _quiet,
    pause: float = 1.0,
    timeout: float = 60.0,
) -> int:
    """The file at `url` as `path`; returns its bytes. A file that is there is left as it is.

    size, sha256  what it must have. pause: seconds before the second try, doubled with each further one.

    Raises:
        DataError: it is another file than the one that is wanted (size, digest), here or there.
        EnvironmentFault: the server refuses it or cannot be reached, or the disk is full. What has come is kept.
        Interrupted: a stop was asked for; the same call goes on.
    """
    if path.is_file():
        return _there(path, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, notes = part_of(path), path.with_name(path.name + ".part.json")
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _go_on(url, part, notes, size, told, timeout)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as fault:
            failed = 0 if part.exists() and part.stat().st_size > before else failed + 1
            if (final := _final(fault, url)) or failed >= TRIES:
                raise final or EnvironmentFault(
                    f"{url}: no answer in {TRIES} tries ({_words(fault)}). "
                    "What came is kept; run the same command again to go on."
                ) from None
            _wait(pause * 2 ** max(failed - 1, 0))
        except OSError as fault:
            if fault.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full(path) from None
            raise
    return settle(part, path, size, sha256, url, notes)


def settle(part: Path, path: Path, size: int | None, sha256: str | None, source: str, notes: Path | None = None) -> int:
    """Check what has come, and give it its name. DataError, and it is deleted, where it is another file."""
    found = part.stat().st_size
    fault = f"it has {found:,} bytes, it should have {size:,}" if size not in (None, found) else ""
    if not fault and sha256 is not None and (digest := digest_of(part)) != sha256:
        fault = f"its sha256 is {digest}, it should be {sha256}"
    if fault:
        part.unlink()
        if notes is not None:
            notes.unlink(missing_ok=True)
        raise DataError(
            f"{source}: {fault}. It was changed there, or damaged on its way, and was deleted here. Run the command "
            "again; if it stays so, the catalogue's row is of another version."
        )
    os.replace(part, path)
    sync_folder(path.parent)
    if notes is not None:
        notes.unlink(missing_ok=True)
    return found


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def full(path: Path) -> EnvironmentFault:
    return EnvironmentFault(
        f"the disk is full: {path}. What came is kept; free some space and run the same command again to go on."
    )


def _there(path: Path, size: int | None) -> int:
    found = path.stat().st_size
    if size not in (None, found):
        raise DataError(
            f"{path} has {found:,} bytes, the file of the catalogue {size:,}. It is another file: move it away, "
            "and run the command again."
        )
    return found


# --- http ----------------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Only from one web address to another."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise urllib.error.HTTPError(req.full_url, code, "sent on to no web address", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _go_on(url: str, part: Path, notes: Path, size: int | None, told: Told, timeout: float) -> None:
    """One request: the rest of what `part` lacks. Returns when all has come; raises what the network raises."""
    have = part.stat().st_size if part.exists() else 0
    version = read_json(notes) if have and notes.exists() else {}
    if version.get("url") != url:
        have = _drop(part, told)
    headers = {"Accept-Encoding": "identity", "User-Agent": "leveret"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if mark := version.get("mark"):
            headers["If-Range"] = mark  # without it, an old half and a new half would be joined
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as refused:
        span = re.fullmatch(r"bytes \*/(\d+)", refused.headers.get("Content-Range", ""))
        if refused.code == 416 and span and int(span[1]) == have:
            return
        if refused.code == 416:
            _drop(part, told)
            raise ConnectionError("the server has less than was fetched; beginning again") from None
        raise
    with answer:
        total = _begins(answer, have)
        if have and total is not None and version.get("total", total) != total:
            _drop(part, told)
            raise ConnectionError("the file was changed on the server meanwhile; beginning again")
        if total is None:  # all of it is sent, wherever we were
            have = _drop(part, told)
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else -1
        if size is not None and total not in (-1, size):
            raise DataError(
                f"{url}: the server's file has {total:,} bytes, the catalogue's {size:,}: it was changed there. "
                "Nothing was fetched."
            )
        etag = answer.headers.get("ETag", "")
        mark = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")
        write_json(notes, {"url": url, "mark": mark, "total": total})
        with open(part, "ab") as file:
            for data in _pieces(answer):
                file.write(data)
                have += len(data)
                told(len(data))
            file.flush()
            os.fsync(file.fileno())
        if total not in (-1, have):
            raise ConnectionError(f"broken off after {have:,} of {total:,} bytes")


def _begins(answer: Any, have: int) -> int | None:
    """Bytes of the whole file, if the answer goes on where we stopped; None if it is all of it.

    A server that sends another range than the one asked for is not trusted with a join.
    """
    if answer.status != 206:
        return None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if not span or int(span[1]) != have:
        raise ConnectionError("the server sent another part of the file than the one asked for")
    return -1 if span[2] == "*" else int(span[2])


def _pieces(answer: Any) -> Iterator[bytes]:
    while True:
        if stop_requested():
            raise Interrupted("the download stopped as asked; what came is kept, run the same command again to go on")
        try:
            data = answer.read(CHUNK)
        except http.client.IncompleteRead as fault:
            if fault.partial:
                yield fault.partial
            raise
        if not data:
            return
        yield data


def _drop(part: Path, told: Told) -> int:
    if part.exists():
        told(-part.stat().st_size)
        part.unlink()
    return 0


def _final(fault: Exception, url: str) -> EnvironmentFault | None:
    """The error of an answer that no second try changes."""
    if not isinstance(fault, urllib.error.HTTPError) or fault.code >= 500 or fault.code in _AGAIN:
        return None
    why = {
        401: "it is given to those who log in",
        403: "it is not given out",
        404: "there is no such file (any more)",
        410: "it was taken away",
    }.get(fault.code, "the server refuses it")
    return EnvironmentFault(f"{url}: {why} ({fault.code}).")


def _words(fault: Exception) -> str:
    if isinstance(fault, urllib.error.HTTPError):
        return f"the server answers {fault.code}"
    return str(getattr(fault, "reason", "") or fault or type(fault).__name__)


def _wait(seconds: float) -> None:
    until = time.monotonic() + min(seconds, 60.0)
    while (left := until - time.monotonic()) > 0:
        if stop_requested():
            raise Interrupted("the download stopped as asked; run the same command again to go on")
        time.sleep(min(left, 0.2))


# --- the hub -------------------------------------------------------------------------------------------------------


def hub_folder(path: Path) -> Path:
    """Where the hub's library keeps what it has of a file, and its notes."""
    return path.with_name(f".{path.name}.hub")


def fetch_hub(
    repository: str,
    name: str,
    path: Path,
    *,
    revision: str = "main",
    size: int | None = None,
    sha256: str | None = None,
    told: Told = _quiet,
) -> int:
    """A file of a data set on the Hugging Face hub, by the hub's own library (its log-in, its resuming). Where the
    catalogue tells no digest, the hub's own is checked: it gives the sha256 of every large file.

    Raises as `fetch`."""
    if path.is_file():
        return _there(path, size)
    import shutil

    import huggingface_hub as hub
    from huggingface_hub import errors

    place, source = hub_folder(path), f"{repository}/{name} on the hub"
    page = f"https://huggingface.co/datasets/{repository}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        about = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, repo_type="dataset", revision=revision))
        if size is not None and about.size not in (None, size):
            raise DataError(
                f"{source}: it has {about.size:,} bytes there, {size:,} in the catalogue: it was changed. Nothing was "
                "fetched."
            )
        got = hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=place)
    except errors.GatedRepoError:
        raise EnvironmentFault(
            f"{source}: its owners ask you to agree first. Do so at {page}, then `hf auth login`, then run this again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise EnvironmentFault(f"{source}: there is no such data set, or it is private: {page}") from None
    except errors.EntryNotFoundError as fault:
        if isinstance(fault, errors.LocalEntryNotFoundError):
            raise EnvironmentFault(f"{source}: the hub cannot be reached ({_first(fault)})") from None
        raise EnvironmentFault(f"{source}: there is no such file (any more); see {page}/tree/{revision}") from None
    except errors.HfHubHTTPError as fault:
        raise EnvironmentFault(f"{source}: the hub did not answer as hoped ({_first(fault)})") from None
    except Exception as fault:
        if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full(path) from None
        # Its library lets errors of the one below it through, which is another one in each of its versions.
        below = {kind.__module__.partition(".")[0] for kind in type(fault).__mro__}
        if isinstance(fault, (ConnectionError, TimeoutError)) or below & {"httpx", "httpcore", "requests", "urllib3"}:
            raise EnvironmentFault(f"{source}: the hub cannot be reached ({_first(fault)})") from None
        raise
    theirs = about.etag if about.etag and re.fullmatch("[0-9a-f]{64}", about.etag) else None
    done = settle(Path(got), path, size if size is not None else about.size, sha256 or theirs, source)
    told(done)
    with contextlib.suppress(OSError):
        shutil.rmtree(place)
    return done


def _first(fault: Exception) -> str:
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)[:200]


def room(path: Path) -> int:
    """Free bytes of the disk that will hold `path`."""
    import shutil

    here = path.absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def enough(path: Path, needed: int) -> None:
    """EnvironmentFault where the disk has less than `needed` bytes left."""
    if (free := room(path)) < needed:
        raise EnvironmentFault(
            f"{path}: {in_bytes(needed)} are needed, the disk has {in_bytes(free)} left. Free some space, or name a "
            "folder on another disk."
        )
