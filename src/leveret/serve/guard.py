"""What every request passes before anything looks at what it asks for.

    id -> Host -> rate -> token -> content type -> body, counted while it is read -> the application
    reply -> id, safe headers, counted

A body is read here and nowhere else: the application finds it whole in `scope["leveret"].body`. Nothing that a
request says is believed: a length is counted, a forwarded address is ignored, an exception's text stays in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leveret.serve.limits import Held, Limits, Rate
from leveret.serve.metrics import Metrics
from leveret.serve.refusals import AUTH, LIMITED, Refusal, bad, busy, failed, too_large

log = logging.getLogger("leveret.serve")

LINGER = 2.0
"""Seconds during which the body of a refused request is read and thrown away: who is still sending when the connection
closes may never see the reply."""

PLAIN_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Content-Security-Policy": PLAIN_POLICY,
    "Cache-Control": "no-store",
}
"""On every reply that does not say otherwise itself."""

_SAFE = [(name.lower().encode(), value.encode()) for name, value in SAFE_HEADERS.items()]

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_JSON = re.compile(r"application/json\s*(;.*)?", re.ASCII | re.IGNORECASE)
_ASKING = ("/v1/chat/completions", "/v1/look")
"""Where bodies are read; elsewhere they are left unread."""


@dataclass(slots=True)
class Visit:
    """One request, from the guard to the route and back.

    body    as it was sent; the route takes it with `take`, and says with `keep` what of it is left.
    route   for the metrics: a name of ours, never a path of theirs.
    """

    id: str
    held: Held
    size: int = 0
    body: bytes = b""
    route: str = "other"
    code: str = ""
    begun: float = field(default_factory=time.perf_counter)

    def take(self) -> bytes:
        body, self.body = self.body, b""
        return body

    def keep(self, size: int) -> None:
        """So many bytes are held from now on, until the reply is sent. Refusal where there is no room for them."""
        self.release()
        if not self.held.take(size):
            raise busy(2)
        self.size = size

    def release(self) -> None:
        self.held.give_back(self.size)
        self.size = 0


class Door:
    """Who may come in.

    hosts   names that the Host header may have beside addresses of this machine; None: any (see `run.Where.names`).
    token   what `Authorization: Bearer` must carry where there is one.
    """

    def __init__(self, limits: Limits, hosts: Sequence[str] | None, token: str | None) -> None:
        self.limits = limits
        self.hosts = None if hosts is None else {host.lower().rstrip(".") for host in hosts}
        self._token = None if token is None else _digest(token.encode())
        self.rate = Rate(limits.rate)

    def check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises Refusal."""
        if self.hosts is not None and not self._host_allowed(headers.get("host", "")):
            raise Refusal(
                403, "the Host header names another server; if it is this one, start it with --allow-host NAME",
                code="host_not_allowed",
            )  # fmt: skip
        path = scope["path"]
        private = path.startswith("/v1/") or path == "/metrics"
        if path in _ASKING and scope["method"] == "POST" and (wait := self.rate.wait(client_of(scope))):
            raise Refusal(
                429, f"more than {self.limits.rate:g} requests a minute", kind=LIMITED, code="rate_limit_exceeded",
                wait=wait,
            )  # fmt: skip
        if self._token is not None and private and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Digests are compared, so that neither the length nor the first different letter can be told by the time.
            if not hmac.compare_digest(_digest(given.strip().encode()), self._token) or scheme.lower() != "bearer":
                raise Refusal(
                    401, "this server asks for a token: send it as Authorization: Bearer TOKEN", kind=AUTH,
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip

    def _host_allowed(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None or self.hosts is None:
            return False
        name = found["name"].lower().rstrip(".")
        # A page of the web that points its own name here (DNS rebinding) sends that name; it cannot send an address.
        return name in self.hosts or is_loopback(name)


def is_loopback(name: str) -> bool:
    """Whether a host, as URLs write it, is this machine by its very name."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def client_of(scope: Scope) -> str:
    """Whose rate counts: an address, of IPv6 the network of 64 bits, which is what one customer has."""
    host = str((scope.get("client") or ("", 0))[0])
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(number, ipaddress.IPv6Address):
        if number.ipv4_mapped is not None:
            return str(number.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(number) >> 64 << 64, 64)))
    return str(number)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Guard:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, door: Door, held: Held, metrics: Metrics) -> None:
        self.app, self.door, self.held, self.metrics = app, door, held, metrics
        self.limits = door.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing else is spoken here
            return
        visit = Visit(f"req-{secrets.token_hex(12)}", self.held)
        scope["leveret"] = visit
        status = 0

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # A body that nobody has read could go on for ever behind the reply: the connection ends with it.
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                close = [(b"connection", b"close")] if unread else []
                message = {**message, "headers": [*_with_safe(message["headers"], visit.id), *close]}
            await send(message)

        try:
            try:
                if "transfer-encoding" in headers and "content-length" in headers:
                    raise bad("two headers say differently how long the body is", code="invalid_http")
                self.door.check(scope, headers)
                if scope["method"] == "POST" and scope["path"] in _ASKING:
                    visit.body = await self._body(receive, headers, visit)
                    unread = False
            except Refusal as refusal:
                visit.code = refusal.code or ""
                if unread and headers.get("expect", "").lower() != "100-continue":
                    await _thrown_away(receive)
                await refuse(refusal, reply)
                return
            await self.app(scope, receive, reply)
        except Exception:
            if visit.code != "internal":  # else it was told already, and is raised once more
                log.exception("%s: %s", visit.id, scope["path"][:200])
            visit.code = "internal"
            if not status:
                await refuse(failed(visit.id), reply)
        finally:
            visit.release()
            self.metrics.requests.labels(visit.route, str(status)).inc()
            self.metrics.seconds.labels(visit.route).observe(time.perf_counter() - visit.begun)
            if visit.code:
                self.metrics.refused.labels(visit.code).inc()

    async def _body(self, receive: Receive, headers: dict[str, str], visit: Visit) -> bytes:
        """The whole body, or Refusal: too large, too slow, too much of all together, not JSON."""
        packed = headers.get("content-encoding", "identity") != "identity"
        if packed or not _JSON.fullmatch(headers.get("content-type", "")):
            raise Refusal(415, "send Content-Type: application/json, not compressed", code="unsupported_media_type")
        most = self.limits.body_bytes
        pieces: list[bytes] = []
        if headers.get("content-length", "").isdigit() and int(headers["content-length"][:20]) > most:
            raise too_large(most)
        until = time.monotonic() + self.limits.body_seconds
        while True:
            left = until - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, min(left, self.limits.pause_seconds))):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "the body took too long to arrive", code="timeout") from None
            if message["type"] == "http.disconnect":
                raise bad("the client left before its body was whole", code="incomplete")
            piece = message.get("body", b"")
            if visit.size + len(piece) > most:
                raise too_large(most)
            if not self.held.take(len(piece)):
                raise busy(2)
            visit.size += len(piece)
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)


async def _thrown_away(receive: Receive) -> None:
    """Read what is left of a body, for at most LINGER seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass


def _with_safe(headers: Any, request_id: str) -> list[tuple[bytes, bytes]]:
    there = {name.lower() for name, _ in headers}
    added = [(name, value) for name, value in _SAFE if name not in there]
    return [*headers, *added, (b"x-request-id", request_id.encode())]


async def refuse(refusal: Refusal, send: Send) -> None:
    """Reply with a refusal."""
    body = json.dumps(refusal.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
