"""The socket, and connections that may not last for ever.

uvicorn bounds how long a connection may be idle after a reply. Here it is also bounded how long headers may take, how
long a client may leave a reply unread, and how many connections there are; what is no HTTP gets OpenAI's form too.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from typing import Any, Literal

from uvicorn.protocols.http.h11_impl import H11Protocol

from leveret.runs import EnvironmentFault
from leveret.serve.limits import Limits
from leveret.serve.refusals import OURS, Refusal, bad

HEADER_BYTES = 32 * 2**10
"""Of a request's line and headers together."""

LINGER = 1.0
"""Seconds in which a client that was refused may still send, to nobody."""


def patient(limits: Limits) -> type[asyncio.Protocol]:
    """A protocol for uvicorn with the limits of one server."""
    return type("PatientOf", (Patient,), {"limits": limits})


class Patient(H11Protocol):  # type: ignore[misc]
    """uvicorn's HTTP/1.1, with an end to its patience."""

    limits = Limits()
    _headers: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _ended = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end(Refusal(503, "too many connections", kind=OURS, code="too_many_connections", wait=1))
            return
        self._headers = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear("_headers")
        self._clear("_unread")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended or self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers(begun=bool(self.conn.trailing_data[0]))

    def _watch_headers(self, begun: bool = True) -> None:
        """Headers are being waited for: then there is one clock for all of them, however they drip in."""
        import h11

        if self.conn.their_state is not h11.IDLE or self._ended or self.transport.is_closing():
            self._clear("_headers")
        elif begun and self._headers is None:
            self._headers = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _clear(self, name: Literal["_headers", "_unread"]) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)

    def _too_slow(self) -> None:
        self._headers = None
        if not (self._ended or self.transport.is_closing()):
            self._end(Refusal(408, "the headers took too long to arrive", code="timeout"))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            # Aborted, not closed: closing would wait until the client has read.
            self._unread = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._clear("_unread")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._end(bad("this is no HTTP/1.1 request that can be read", code="invalid_http"))

    def _end(self, refusal: Refusal) -> None:
        """Say why, and close. In the middle of a reply there is nothing to say.

        Our side is closed first: closing both while there is something unread would reset the connection, and the
        client might never see the reply."""
        self._ended = True
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = json.dumps(refusal.body()).encode()
            retry = "".join(f"{name}: {value}\r\n" for name, value in refusal.headers.items())
            reasons = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
            head = (
                f"HTTP/1.1 {refusal.status} {reasons[refusal.status]}\r\nContent-Type: application/json\r\n{retry}"
                f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode("latin-1") + body)
        if cycle is not None and not cycle.response_complete:  # nobody hears what the application may still say
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, not listening yet. EnvironmentFault when the address is taken, not ours or unknown."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise EnvironmentFault(
            f"--host {host}: no such address; 127.0.0.1 is this machine alone, 0.0.0.0 all its networks"
        ) from None
    family, kind, number, _, address = found[0]
    line = socket.socket(family, kind, number)
    try:
        # A port is free again at once after the server before was killed; on Windows the option means something else.
        if hasattr(socket, "SO_REUSEPORT"):
            line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        line.bind(address)
    except OSError as fault:
        line.close()
        raise taken(host, port, fault) from None
    return line


def taken(host: str, port: int, fault: OSError) -> EnvironmentFault:
    """Why a server cannot listen there."""
    if fault.errno == errno.EADDRINUSE:
        return EnvironmentFault(
            f"--port {port}: another program listens there; choose another port, or 0 for any that is free"
        )
    if fault.errno == errno.EACCES:
        return EnvironmentFault(f"--port {port}: not allowed (ports below 1024 are the system's); choose another")
    if fault.errno == errno.EADDRNOTAVAIL:
        return EnvironmentFault(f"--host {host}: not an address of this machine; 0.0.0.0 is all of them")
    return EnvironmentFault(f"cannot listen on {host}, port {port}: {fault.strerror or 'refused'}")
