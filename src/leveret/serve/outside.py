"""Fetching one file from a host that the server's owner allowed, and from nowhere else.

    URL --(one strict grammar)--> host, path --(on the list?)--> lookup --(every address public?)--> connect to that
    very address --(TLS for the name)--> one answer, within one time limit and one size

Nothing is parsed, looked up or decided twice: gaps between two readings of one URL are how such checks are usually
passed by (another parser's idea of `\\\\` and `@`: CVE-2026-24779; a name that resolves to another address the second
time). Redirects, proxies named by the environment, and compressed answers are not followed, used or unpacked.
Refusals are `ImageFault`s with one of the fixed reasons in `REASONS`; what really happened goes to the log alone.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from leveret.images import ImageFault
from leveret.runs import RecipeError

log = logging.getLogger("leveret.serve")

_ITSELF = "Send the image itself, as a data URI (data:image/png;base64,...)"

REASONS = {
    "fetching is off": f"This server fetches no images. {_ITSELF}",
    "not a web address": "The form is https://host/path, in plain ASCII: no user, no port of its own, no blanks or"
    " backslashes",
    "host not allowed": f"This server fetches images from the hosts on its list only. {_ITSELF}",
    "address not allowed": f"That host does not lie in the open net. {_ITSELF}",
    "redirected": "Redirects are not followed: give the address where the image itself lies",
    "compressed": "Compressed answers are not unpacked: the host must send the image as it is",
    "not fetched": "The host could not be reached or did not give the file: see whether the address opens elsewhere",
    "too slow": f"The host took too long. {_ITSELF}",
    "type not allowed": "The host says that this is no JPEG, PNG or WebP image",
}
"""Every reason a fetch can be refused for, and how to mend it."""

LONGEST = 4096
"""Characters of a URL. Signed ones have 2,000."""

LOOKUPS = 8
"""Name lookups at once. One cannot be broken off, and an attacker could pile them up; who waits, waits within his
time limit."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?")
"""A host's name: dots between labels, the last begins with a letter. So nothing that any reader would take for a
number (2130706433, 0x7f.1, 127.0.0.1) is a name."""

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/(?:[\w.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*)?(?P<query>\?(?:[\w.~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?"
    r"(?:\#[\x21-\x7e]*)?",
    re.ASCII | re.IGNORECASE,
)
"""RFC 3986, less what nobody needs who names an image: users, passwords, addresses in brackets, reg-names with `%`."""

_PORTS = {"http": 80, "https": 443}

_TYPES = ("image/jpeg", "image/jpg", "image/png", "image/webp", "application/octet-stream", "binary/octet-stream", "")
"""What an answer may call itself. Stores often know no better than "bytes"; the bytes decide."""

_HIDDEN_V4 = tuple(
    ipaddress.IPv4Network(net)
    for net in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # a public number, and Azure's own door to its virtual machines
    )
)  # fmt: skip
"""The IANA's special-purpose registry (RFC 6890 and after) and multicast. Written out: `ipaddress.is_global` calls
multicast global, and what it knows of the rest differs between Python 3.11.7 and 3.11.10."""

_OPEN_V6 = ipaddress.IPv6Network("2000::/3")
_HIDDEN_V6 = tuple(
    ipaddress.IPv6Network(net)
    for net in (
        "2001::/23",  # Teredo, ORCHID, benchmarks
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address in other clothes
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""How machines that have IPv6 alone reach IPv4 (RFC 6052): the last 32 bits are the address that counts."""


def domain(text: str) -> str:
    """One entry of the list of allowed hosts: a name (`images.example.org`), or `*.example.org` for all names below it.

    Capitals and letters outside ASCII are written as the net does. RecipeError where it is no name.
    """
    star, name = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    try:
        plain = name.encode("idna").decode("ascii").lower()
    except UnicodeError:
        plain = ""
    if not _NAME.fullmatch(plain) or (star and "." not in plain):
        raise RecipeError(
            f"--allow-domain {text}: this is no host's name. Give one as images.example.org, or *.example.org for all "
            "below it; no https://, no port, no path, no number."
        )
    return star + plain


def public(address: str) -> bool:
    """Whether an address (as `getaddrinfo` spells it) is one of the open net, by its own number and by the IPv4 number
    it may hide. What is not known to be open is not: of IPv6 only 2000::/3, less what is set aside in it."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(number, ipaddress.IPv6Address):
        if number.scope_id is not None:
            return False
        if number in _NAT64:
            return public(str(ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)))
        return number in _OPEN_V6 and not any(number in net for net in _HIDDEN_V6)
    return not any(number in net for net in _HIDDEN_V4)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, read once. `path` is what follows `GET `."""

    scheme: str
    host: str
    port: int
    path: str


def target(url: str, domains: Sequence[str]) -> Target:
    """Read a URL and look its host up on the list. `domains` as `domain` writes them. ImageFault."""
    if not domains:
        raise refused("fetching is off")
    found = _URL.fullmatch(url) if len(url) <= LONGEST else None
    if found is None:
        raise refused("not a web address")
    scheme, host = found["scheme"].lower(), found["host"].lower()
    if not _NAME.fullmatch(host) or not any(
        host == entry or (entry.startswith("*.") and host.endswith(entry[1:])) for entry in domains
    ):
        raise refused("host not allowed")
    port = _PORTS[scheme]
    if found["port"] is not None and int(found["port"]) != port:
        raise refused("not a web address")
    return Target(scheme, host, port, (found["path"] or "/") + (found["query"] or ""))


class Net:
    """The three places where this file touches the net. Tests stand in for them."""

    def lookup(self, host: str, port: int) -> list[str]:
        """Addresses of a name, in the order they should be tried. OSError."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def dial(self, address: str, port: int, seconds: float) -> socket.socket:
        """Connect to an address, never to a name. OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        line = socket.socket(family, socket.SOCK_STREAM)
        try:
            line.settimeout(seconds)
            line.connect((address, port))
        except BaseException:
            line.close()
            raise
        return line

    def secure(self, line: socket.socket, host: str) -> socket.socket:
        """TLS over the line, the certificate held against `host`. OSError."""
        return _tls().wrap_socket(line, server_hostname=host)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


NET = Net()
_looking = threading.BoundedSemaphore(LOOKUPS)


def fetch(url: str, domains: Sequence[str], *, most: int, seconds: float, net: Net = NET) -> bytes:
    """The file at `url`: at most `most` bytes, within `seconds` from first to last. ImageFault."""
    where = target(url, domains)
    clock = _Clock(seconds)
    try:
        with closing(_connect(where, clock, net)) as line:
            return _answer(line, where, clock, most)
    except _Flood:
        raise _too_large(most) from None
    except ImageFault as fault:
        log.info("%s: %s", where.host, fault.reason)
        raise
    except TimeoutError:
        log.info("%s: too slow, %.1f s", where.host, seconds)
        raise refused("too slow", f"more than {seconds:g} s") from None
    # http.client raises ValueError and worse over numbers that are none.
    except (OSError, http.client.HTTPException, ValueError, EOFError) as fault:
        log.info("%s: not fetched: %r", where.host, fault)
        raise refused("not fetched") from None


def refused(reason: str, detail: str = "") -> ImageFault:
    """The fault of a reason in `REASONS`."""
    return ImageFault(reason, detail, mending=REASONS[reason])


class _Clock:
    """One time limit over many steps, each of which would have its own. TimeoutError."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _connect(where: Target, clock: _Clock, net: Net) -> socket.socket:
    addresses = _looked_up(where, clock, net)
    if not addresses or not all(public(address) for address in addresses):
        log.warning("%s resolves to %s", where.host, ", ".join(addresses) or "nothing")
        raise refused("address not allowed")
    for tried, address in enumerate(addresses):
        try:
            line = net.dial(address, where.port, clock.left() / (len(addresses) - tried))
            break
        except OSError:
            if tried == len(addresses) - 1:
                raise
    line.settimeout(clock.left())
    if where.scheme == "http":
        return line
    try:
        return net.secure(line, where.host)
    except BaseException:
        line.close()
        raise


def _looked_up(where: Target, clock: _Clock, net: Net) -> list[str]:
    """A lookup takes no time limit, so it is done aside, and left there if it takes too long."""
    told: list[Any] = []

    def look() -> None:
        try:
            told.append(net.lookup(where.host, where.port))
        except Exception as fault:
            told.append(fault)
        finally:
            _looking.release()

    if not _looking.acquire(timeout=clock.left()):
        raise TimeoutError
    aside = threading.Thread(target=look, name="lookup", daemon=True)
    try:
        aside.start()
    except BaseException:
        _looking.release()
        raise
    aside.join(clock.left())
    clock.left()
    if not told:
        raise TimeoutError
    if isinstance(told[0], Exception):
        raise told[0] if isinstance(told[0], OSError) else OSError(f"lookup: {told[0]!r}")
    return told[0]


class _Flood(OSError):
    """More than the wire may bring. No `ImageFault`: http.client takes a ValueError for a wrong number of its own."""


class _Wire(io.RawIOBase):
    """A connection as a file: all its reads share one clock, and one number of bytes that headers and chunks count to.

    Handed to `http.client.HTTPResponse` in place of a socket.
    """

    def __init__(self, line: socket.socket, clock: _Clock, most: int) -> None:
        self._line, self._clock, self._left = line, clock, most

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._line.settimeout(self._clock.left())
        got = self._line.recv_into(buffer)
        self._left -= got
        if self._left < 0:
            raise _Flood
        return got


def _answer(line: socket.socket, where: Target, clock: _Clock, most: int) -> bytes:
    line.settimeout(clock.left())
    line.sendall(
        (
            f"GET {where.path} HTTP/1.1\r\nHost: {where.host}\r\nConnection: close\r\nUser-Agent: leveret\r\n"
            "Accept: image/webp,image/png,image/jpeg\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode("ascii")
    )
    # Beside the body: headers (http.client takes 100 of 64 KiB), and the sizes between chunks.
    wire: Any = _Wire(line, clock, 2 * most + 2**16)
    answer = http.client.HTTPResponse(wire, method="GET")
    answer.begin()
    if 300 <= answer.status < 400:
        raise refused("redirected")
    if answer.status != 200:
        raise refused("not fetched", f"it answers {answer.status}")
    if (answer.getheader("Content-Encoding") or "identity").strip().lower() != "identity":
        raise refused("compressed")
    if (answer.getheader("Content-Type") or "").partition(";")[0].strip().lower() not in _TYPES:
        raise refused("type not allowed")
    promised = answer.length  # None where chunks or the end of the connection tell
    if promised is not None and promised > most:
        raise _too_large(most)
    pieces: list[bytes] = []
    size = 0
    while piece := answer.read(2**16):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise _too_large(most)
    if promised is not None and size != promised:
        raise EOFError(f"broken off after {size} of {promised} bytes")
    return b"".join(pieces)


def _too_large(most: int) -> ImageFault:
    return ImageFault("too large a file", mending=f"At most {most:,} bytes: make it smaller")
