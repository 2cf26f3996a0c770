"""An OpenAI-compatible endpoint: patient where it is busy, clear where it refuses, several requests at once.

Needs the standard library alone, and no torch. A key is read from an environment variable that is named; it is never
part of a URL, a file or a message.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from leveret.runs import EnvironmentFault, Interrupted, RecipeError, UserError, stop_requested

LONGEST_WAIT = 60.0
"""Seconds between two tries, where the server does not say."""
LONGEST_ASKED = 600.0
"""Seconds that a server may ask us to wait; one that asks for more is done for now."""
MOST_BYTES = 2**24
OPENAI = "api.openai.com"


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply.

    finish  as the server says: "stop", "length", "content_filter".
    usage   `prompt_tokens` and `completion_tokens`, where the server counts them.
    """

    text: str
    model: str = ""
    finish: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)


class Filtered(UserError):
    """The server's content filter refused this one request; others may be answered."""


class _Busy(Exception):
    """Worth another try. `wait`: seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the question into a GET and carry the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """One model behind one URL.

    url         up to and with the version, `https://host/v1`; a host alone means `/v1`.
    key_env     environment variable that holds the key; None sends one to api.openai.com alone, OPENAI_API_KEY.
    tries       of one request, the first included.
    first_wait  seconds after the first failure; doubled after each, up to LONGEST_WAIT. Retry-After goes before.
    timeout     seconds without a byte.
    tell        takes a line for the user; stderr by default.

    Raises RecipeError for a URL or a key that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        tries: int = 8,
        first_wait: float = 1.0,
        timeout: float = 180.0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.url, host = _address(url)
        self.model = model
        self.tries, self.first_wait, self.timeout = tries, first_wait, timeout
        self._tell = tell or (lambda line: print(line, file=sys.stderr, flush=True))
        named = key_env or ("OPENAI_API_KEY" if host == OPENAI else None)
        self._key_from = named
        self._key = os.environ.get(named, "").strip() if named else ""
        if key_env and not self._key:
            raise RecipeError(
                f"{key_env} is empty or not set: `export {key_env}=...` puts the key for {self.url} there."
            )
        if not self._key.isascii() or any(letter.isspace() for letter in self._key):
            raise RecipeError(f"{named} does not hold one key: there are blanks or letters in it that no key has.")
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._lock = threading.Lock()
        self._resume = 0.0
        self._limit_name = "max_tokens"

    def complete(self, body: Mapping[str, Any]) -> Completion:
        """Post one request (`messages`, `temperature`, `max_tokens`); `model` is put in where it is not named.

        Waits and tries again where the server is busy (408, 409, 425, 429, 5xx), cuts the connection, or answers with
        something that is no completion; all requests wait together. May be called from several threads.

        Raises:
            Filtered: this request alone is refused by a content filter.
            EnvironmentFault: refused (key, model, quota, a field), or no answer after all tries.
            Interrupted: a stop was asked for meanwhile.
        """
        for number in range(1, self.tries + 1):
            self._pause()
            try:
                return self._once({"model": self.model, **body})
            except _Busy as fault:
                if fault.wait is not None and fault.wait > LONGEST_ASKED:
                    raise EnvironmentFault(
                        f"{self.url}: {fault}, and asks to wait {fault.wait:,.0f} s. Run the same command again then: "
                        "what came is kept."
                    ) from None
                if number == self.tries:
                    raise EnvironmentFault(
                        f"{self.url}: {fault}; gave up after {number} tries. What came is kept, and the same command "
                        "asks only what is missing."
                    ) from None
                own = min(self.first_wait * 2 ** (number - 1), LONGEST_WAIT) * random.uniform(1.0, 1.25)
                self._put_off(own if fault.wait is None else fault.wait, f"{fault}", number)
        raise AssertionError("the loop ends in a return or a fault")

    def _put_off(self, seconds: float, why: str, number: int) -> None:
        """All requests wait from now on; said once where it is longer than they wait anyhow."""
        until = time.monotonic() + seconds
        with self._lock:
            longer = until - self._resume
            self._resume = max(self._resume, until)
        if longer > seconds / 2:
            self._tell(f"{self.url}: {why}; waiting {seconds:.1f} s (try {number} of {self.tries})")

    def _pause(self) -> None:
        while (left := self._resume - time.monotonic()) > 0:
            if stop_requested():
                raise Interrupted("stopped while waiting for the server; the same command goes on")
            time.sleep(min(left, 0.1))

    def _once(self, body: dict[str, Any]) -> Completion:
        if self._limit_name != "max_tokens" and "max_tokens" in body:
            body[self._limit_name] = body.pop("max_tokens")
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "leveret"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        post = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers=headers, method="POST"
        )
        try:
            with self._opener.open(post, timeout=self.timeout) as answer:
                data = answer.read(MOST_BYTES)
        except urllib.error.HTTPError as fault:
            return self._refused(fault, body)
        except urllib.error.URLError as fault:
            if isinstance(fault.reason, ssl.SSLCertVerificationError):
                raise EnvironmentFault(
                    f"{self.url}: its certificate is not trusted ({fault.reason.verify_message}). SSL_CERT_FILE names "
                    "the file of one's own authority."
                ) from None
            raise _Busy(f"no connection ({_words(fault.reason)})") from None
        except (OSError, http.client.HTTPException) as fault:
            raise _Busy(f"the connection broke ({_words(fault)})") from None
        try:
            told = json.loads(data)
            choice = told["choices"][0]
            text = choice["message"].get("content")
            if text is not None and not isinstance(text, str):
                raise TypeError("content")
            usage = {name: n for name, n in (told.get("usage") or {}).items() if isinstance(n, int)}
            return Completion(text or "", str(told.get("model") or ""), str(choice.get("finish_reason") or ""), usage)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Busy(f"its answer is no chat completion: {data[:60].decode('utf-8', 'replace')!r}") from None

    def _refused(self, fault: urllib.error.HTTPError, body: Mapping[str, Any]) -> Completion:
        with fault:
            try:
                data = fault.read(65536)
            except (OSError, http.client.HTTPException):
                data = b""
        code, said = _said(data)
        words = f"answers {fault.code}{f': {said}' if said else ''}"
        if fault.code == 429 and code == "insufficient_quota":
            raise EnvironmentFault(f"{self.url}: {words}. There is no quota left for this key ({self._key_from}).")
        if fault.code in (408, 409, 425, 429) or fault.code >= 500:
            raise _Busy(words, _retry_after(fault.headers.get("Retry-After")))
        if code == "content_filter":
            raise Filtered(f"refused by the server's content filter: {said}")
        if fault.code == 400 and "max_completion_tokens" in said and "max_tokens" in body:
            self._limit_name = "max_completion_tokens"  # what newer models call the same thing
            return self._once(dict(body))
        key = f"The key comes from {self._key_from}." if self._key_from else "No key was sent: name its variable."
        mend = {
            401: key,
            403: key,
            404: f"Is the model {body.get('model')!r} there, and does the URL end in /v1?",
        }.get(fault.code, "")
        if 300 <= fault.code < 400:
            mend = f"It sends us on to {fault.headers.get('Location')}; give that address if it is the one you mean."
        raise EnvironmentFault(f"{self.url}: {words}. {mend}".rstrip())


def _address(url: str) -> tuple[str, str]:
    """(the URL without a last slash, its host). RecipeError where it is none, or holds a secret."""
    given = url.strip()
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise RecipeError(f"{given!r} is no URL of an endpoint; it looks like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RecipeError(
            f"The URL of {host} holds more than an address (a user, a password, or something behind ? or #). Give the "
            "address alone; a key goes into an environment variable that you name."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}", host


def _words(fault: object) -> str:
    strerror = getattr(fault, "strerror", None)
    return str(strerror or fault or type(fault).__name__)


def _said(data: bytes) -> tuple[str, str]:
    """(code, message) of an error body, in OpenAI's form or others', on one line of at most 300 letters."""
    text = data.decode("utf-8", "replace")
    try:
        told = json.loads(text)
        error = told.get("error", told)
        code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else ("", error)
        text = str(message or text)
    except (ValueError, AttributeError, RecursionError):
        code = ""
    return str(code or ""), " ".join(text.split())[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None where it says nothing."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


Job = TypeVar("Job")
Result = TypeVar("Result")


def at_once(jobs: Sequence[Job], work: Callable[[Job], Result], parallel: int) -> Iterator[tuple[Job, Result]]:
    """(job, its result) as they finish, `parallel` at a time, each in a thread.

    When a stop is asked for, or a job fails, no further one is begun; what is under way is still waited for and
    given, for it may have been paid for. Then Interrupted, or the first fault, is raised.
    """
    waiting, ended = deque(jobs), SimpleQueue[tuple[Job, Any, BaseException | None]]()
    fault: BaseException | None = None

    def run() -> None:
        while not stop_requested():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                ended.put((job, work(job), None))
            except BaseException as error:  # told by the thread that asked
                ended.put((job, None, error))

    # Daemons: a second Ctrl-C ends the process without waiting for a server.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(max(1, min(parallel, len(jobs))))]
    for thread in threads:
        thread.start()
    given = 0
    try:
        while given < len(jobs):
            if stop_requested():
                waiting.clear()
            try:
                job, result, error = ended.get(timeout=0.1)
            except Empty:
                if not any(thread.is_alive() for thread in threads) and ended.empty():
                    break
                continue
            given += 1
            if error is None:
                yield job, result
                continue
            waiting.clear()
            # A fault says more than the stops that it brought about.
            fault = error if fault is None or isinstance(fault, Interrupted) else fault
    finally:
        waiting.clear()
    if fault is not None:
        raise fault
    if given < len(jobs):
        raise Interrupted("Stopped; what came is kept, and the same command asks only what is missing.")
