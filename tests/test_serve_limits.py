"""What one client may do to a server: less than it would like, and never to the harm of the next."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.runs import RecipeError
from leveret.serve.app import packaged
from leveret.serve.guard import PAGE_POLICY, Door, client_of
from leveret.serve.limits import CLIENTS, Held, Limits, Rate
from leveret.serve.refusals import LONGEST, Refusal
from leveret.serve.run import Where
from serve_fakes import NAME, Up, about, client_for, picture, question, rest_of, serving, soon

pytestmark = pytest.mark.serve

LONG = {"max_tokens": 480, "stream": True}
"""The tiny model has 512 positions."""


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    limits = Limits(
        body_bytes=100_000, held_bytes=150_000, images=2, pixels=10_000, header_seconds=0.6, pause_seconds=0.6,
        body_seconds=1.5, write_seconds=0.5,
    )  # fmt: skip
    with serving(limits=limits, max_pixels=10_000) as server:
        yield server


def head(path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> bytes:
    lines = {"Host": "localhost", "Content-Type": "application/json", **headers}
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in lines.items()), "", ""]
    ).encode("latin-1")


def told(reply: bytes) -> tuple[int, dict[str, Any]]:
    """(status, error) of a reply as bytes."""
    first, _, rest = reply.partition(b"\r\n")
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(first.split()[1]), error


def is_well(up: Up) -> None:
    """The next honest request is answered, and nothing is held for those before."""
    assert up.post({}).status_code == 200
    soon(lambda: up.service.held.now == 0)
    soon(lambda: up.service.live.figures()["active"] == 0)


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_declared_or_not(up: Up) -> None:
    large = json.dumps(question("x" * 200_000)).encode()
    declared = up.http.post("/v1/chat/completions", content=large, headers={"Content-Type": "application/json"})
    pieces = (large[place : place + 5000] for place in range(0, len(large), 5000))
    chunked = up.http.post("/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"})
    for answer in (declared, chunked):
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert answer.headers["connection"] == "close"
    is_well(up)


def test_who_asks_first_need_not_send_what_is_too_large(up: Up) -> None:
    reply = up.raw(head(Content_Length="9999999", Expect="100-continue"))
    assert told(reply)[0] == 413 and b"100 Continue" not in reply
    is_well(up)


def test_a_body_that_says_a_wrong_length_of_itself(up: Up) -> None:
    for length in ("-1", "1e3", "9" * 40, "0x10", "1, 2"):
        status, _ = told(up.raw(head(Content_Length=length)))
        assert status in (400, 413)
    is_well(up)


@pytest.mark.parametrize("drip", [False, True])
def test_a_body_that_takes_its_time_is_not_waited_for(up: Up, drip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.serve.guard.LINGER", 0.3)
    with socket.create_connection(up.address, timeout=20) as line:
        line.sendall(head(Content_Length="5000") + b'{"model":')
        if drip:
            stop = threading.Event()

            def send() -> None:
                while not stop.wait(0.1):
                    try:
                        line.sendall(b" ")
                    except OSError:
                        return

            thread = threading.Thread(target=send)
            thread.start()
            try:
                reply = rest_of(line)
            finally:
                stop.set()
                thread.join()
        else:
            reply = rest_of(line)
    assert told(reply)[0] == 408
    is_well(up)


def test_all_bodies_together_have_a_bound(up: Up) -> None:
    with socket.create_connection(up.address, timeout=20) as line:
        line.sendall(head(Content_Length="95000") + b" " * 90_000)
        soon(lambda: up.service.held.now >= 90_000)
        answer = up.post({"messages": [{"role": "user", "content": "x" * 80_000}]})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert up.post({}).status_code == 200, "there is room for small ones"
    is_well(up)


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {"Content-Type": ""}, {"Content-Type": "application/x-www-form-urlencoded"},
     {"Content-Type": "application/json", "Content-Encoding": "gzip"}, {"Content-Type": "application/jsonx"}],
)  # fmt: skip
def test_only_json_is_read(up: Up, headers: dict[str, str]) -> None:
    """Nor can a page of the web send it from its visitor's browser without being asked first whether it may."""
    answer = up.http.post("/v1/chat/completions", content=json.dumps(question()), headers=headers)
    assert answer.status_code == 415
    charset = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert up.http.post("/v1/chat/completions", content=json.dumps(question()), headers=charset).status_code == 200


def test_pictures_have_limits(up: Up) -> None:
    small = picture(size=(8, 8))
    three = up.post({"messages": about(small, small, small)})
    assert three.status_code == 400 and three.json()["error"]["code"] == "too_many_images"
    assert three.json()["error"]["param"] == "messages[0].content[2]"
    large = up.post({"messages": about(picture(size=(200, 200)))})
    assert large.status_code == 400 and "too many pixels" in large.json()["error"]["message"]
    assert up.post({"messages": about(small, small)}).status_code == 200
    is_well(up)


# --- connections -----------------------------------------------------------------------------------------------------


def test_headers_that_drip_in_are_not_waited_for(up: Up) -> None:
    begun = time.monotonic()
    with socket.create_connection(up.address, timeout=20) as line:
        assert told(rest_of(line))[0] == 408, "nor is one who says nothing"
    with socket.create_connection(up.address, timeout=20) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while b'"ready"}' not in got:
            got += line.recv(65536)
        reply = b""
        for letter in b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 10_000:  # the next request of the same connection
            try:
                line.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.05)
            line.settimeout(0.001)
            try:
                reply += line.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if reply:
                break
        assert told(reply)[0] == 408
    assert time.monotonic() - begun < 30
    is_well(up)


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000,
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
     b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_told_so(up: Up, data: bytes) -> None:
    assert told(up.raw(data))[0] == 400
    is_well(up)


def test_a_body_in_crumbs_is_refused() -> None:
    """Else it would be read byte by byte while others wait."""
    with serving() as up:
        crumbs = head(Transfer_Encoding="chunked") + b"1\r\nx\r\n" * 120_000
        assert told(up.raw(crumbs))[1]["message"] == "the body comes in pieces that are too small"
        body = json.dumps(question("x" * 300)).encode()
        pieces = (body[place : place + 5] for place in range(0, len(body), 5))
        small = up.http.post("/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"})
        assert small.status_code == 200
        is_well(up)


def test_where_a_body_ends_is_said_once(up: Up) -> None:
    """Else a proxy before it may read one request where this one reads two."""
    both = head(Content_Length="5", Transfer_Encoding="chunked") + b"0\r\n\r\n" + head("/smuggled", "GET")
    reply = up.raw(both)
    assert told(reply)[0] == 400 and reply.count(b"HTTP/1.1") == 1
    is_well(up)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_a_body_that_nobody_reads_ends_the_connection(up: Up, path: str) -> None:
    for method in ("GET", "POST"):
        reply = up.raw(head(path, method, Content_Length="1000000000") + b"x" * 1000)
        assert reply.count(b"HTTP/1.1") == 1 and b"connection: close" in reply.lower()
    is_well(up)


def test_a_half_closed_connection_hangs_nothing(up: Up) -> None:
    body = json.dumps(question()).encode()
    with socket.create_connection(up.address, timeout=20) as line:
        line.sendall(head(Content_Length=str(len(body))) + body)
        line.shutdown(socket.SHUT_WR)
        rest_of(line)
    with socket.create_connection(up.address, timeout=20) as line:
        line.sendall(head(Content_Length="5000") + b"{")
        line.shutdown(socket.SHUT_WR)
        rest_of(line)
    is_well(up)


def test_connections_have_a_bound() -> None:
    with serving(limits=Limits(connections=3)) as up:
        up.post({})  # its client keeps one
        lines = [socket.create_connection(up.address, timeout=20) for _ in range(2)]
        soon(lambda: len(up.running.server.server_state.connections) == 3)
        status, error = told(up.raw(head("/health", "GET")))
        assert (status, error["code"]) == (503, "too_many_connections")
        for line in lines:
            line.close()
        soon(lambda: len(up.running.server.server_state.connections) == 1)
        assert up.raw(head("/health", "GET", Connection="close")).startswith(b"HTTP/1.1 200")


# --- clients that leave, and the queue -------------------------------------------------------------------------------


def test_an_answer_is_not_made_for_who_has_left(up: Up) -> None:
    before = up.service.live.figures()["left"]
    with httpx.stream("POST", f"{up.url}/v1/chat/completions", json=question(**LONG, n=2)) as answer:
        next(answer.iter_lines())
    soon(lambda: up.service.live.figures()["left"] == before + 2)
    body = json.dumps(question(max_tokens=480)).encode()  # and who waits for the whole
    with socket.create_connection(up.address) as line:
        line.sendall(head(Content_Length=str(len(body))) + body)
        soon(lambda: up.service.live.figures()["active"])
    soon(lambda: up.service.live.figures()["left"] == before + 3)
    is_well(up)


def test_who_does_not_read_is_not_waited_for(up: Up) -> None:
    before = up.service.live.figures()["left"]
    # Some megabytes, more than the kernel takes for both sides.
    body = json.dumps(question(**LONG, n=8, logprobs=True, top_logprobs=20)).encode()
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(60)
        line.connect(up.address)
        line.sendall(head(Content_Length=str(len(body))) + body)
        # Cut off while it is being made, or after it: either way nothing is left of it.
        soon(lambda: up.service.live.figures()["active"] or up.service.live.figures()["left"] > before)
        soon(lambda: not any(not c.cycle or not c.cycle.response_complete
                             for c in up.running.server.server_state.connections))  # fmt: skip
        soon(lambda: up.service.live.figures()["active"] == 0)
    is_well(up)


def test_a_full_queue_says_when_to_come_again() -> None:
    with serving(limits=Limits(waiting=1), slots=1) as up, ThreadPoolExecutor(6) as crowd:
        answers = list(crowd.map(lambda number: up.post({"max_tokens": 200}), range(6)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "overloaded"
        # Of three answers asked for at once none is made where not all have room.
        assert up.post({"n": 3, "max_tokens": 200}).status_code in (200, 429)
        is_well(up)


def test_many_at_once_get_the_answers_of_one_alone(up: Up) -> None:
    """What the terminal chat gives is in the tests of the API; here the company must not change it. Where two tokens
    are as good as equally likely, the order of a sum decides, which is no fault."""
    texts = ["red", "two circles", "a", "is"] * 3
    told = {"logprobs": True, "top_logprobs": 2}
    asked = [question(text, max_tokens=4 + 3 * place, **told) for place, text in enumerate(texts)]

    def ask(body: dict[str, Any]) -> Any:
        return up.post(body).json()["choices"][0]["logprobs"]["content"]

    alone = [ask(body) for body in asked]
    with ThreadPoolExecutor(12) as crowd:
        together = list(crowd.map(ask, asked))
    for one, other in zip(alone, together, strict=True):
        first = next((token for token, also in zip(one, other, strict=False) if token["token"] != also["token"]), None)
        if first is not None:
            best, second = first["top_logprobs"]
            assert best["logprob"] - second["logprob"] < 1e-3


# --- who may come in -------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_where_there_is_one() -> None:
    token = "open-sesame-42"
    with serving(where=Where(port=0, token=token), key=token) as up:
        for headers in (
            {}, {"Authorization": "Bearer wrong"}, {"Authorization": token}, {"Authorization": f"Basic {token}"},
            {"Authorization": "Bearer"}, {"Authorization": f"Bearer {token}x"}, {"Authorization": "Bearer \xff\xfe"},
        ):  # fmt: skip
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = up.http.get(path, headers=raw)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert up.http.post("/v1/chat/completions", json=question(), headers=raw).status_code == 401
        assert up.http.get("/health").status_code == 200
        assert up.client.models.list().data[0].id == NAME
        assert up.client.chat.completions.create(**question()).choices
        assert up.http.get("/metrics", headers={"Authorization": f"bearer {token}"}).status_code == 200
        described = up.http.get("/openapi.json").json()
        assert described["paths"]["/v1/chat/completions"]["post"]["security"] == [{"bearer": []}]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:1", True), ("127.9.9.9", True), ("[::1]:80", True),
     ("app.localhost", True), ("mine.example", True), ("evil.example", False), ("localhost.evil.example", False),
     ("evil.example:80@localhost", False), ("", False), ("127.1", False), ("192.168.0.1", False), ("[::1", False),
     ("localhost:99999999", False), ("localhost/../", False), ("2130706433", False), ("xn--localhost-", False)],
)  # fmt: skip
def test_another_name_for_this_machine_is_not_believed(host: str, allowed: bool) -> None:
    """DNS rebinding: a page of the web points its own name at 127.0.0.1 and then speaks as if it were from here."""
    door = Door(Limits(), Where(hosts=("mine.example",)).names(), None)
    scope = {"path": "/v1/models", "method": "GET"}
    if allowed:
        door.check(scope, {"host": host})
    else:
        with pytest.raises(Refusal) as found:
            door.check(scope, {"host": host})
        assert found.value.status == 403


def test_who_listens_to_all_has_many_names() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        assert Where(host).names() is None
    assert Where("0.0.0.0", hosts=["a.example"]).names() == ["0.0.0.0", "a.example"]


def test_names_that_no_browser_sends_are_refused() -> None:
    for origin in ("foo", "https://a.example/", "https://a.example/b", "HTTPS://a.example", ""):
        with pytest.raises(RecipeError, match="--allow-origin"):
            Where(origins=[origin])
    for name in ("", "http://a.example", "a.example:80", "a b"):
        with pytest.raises(RecipeError, match="--allow-host"):
            Where(hosts=[name])
    Where(hosts=["a.example", "[::1]"], origins=["http://localhost:3000", "https://a.example", "*", "null"])


def test_the_host_is_looked_at_on_every_path(up: Up) -> None:
    for path in ("/", "/health", "/v1/models", "/metrics", "/openapi.json", "/page/x.js"):
        assert up.http.get(path, headers={"Host": "evil.example"}).status_code == 403


def test_pages_of_other_hosts_may_not_ask_unless_they_are_named(up: Up) -> None:
    there = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asked = up.http.options("/v1/chat/completions", headers=there)
    answered = up.http.get("/v1/models", headers=there)
    assert not any(name.startswith("access-control") for one in (asked, answered) for name in one.headers)
    with serving(where=Where(port=0, origins=("https://app.example",), token="t")) as named:
        asked = named.http.options("/v1/chat/completions", headers=there)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://app.example"
        other = named.http.options("/v1/chat/completions", headers={**there, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_rate_holds_for_each_address() -> None:
    with serving(limits=Limits(rate=8)) as up:
        statuses = [up.post({}).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = up.post({})
        assert int(refused.headers["retry-after"]) > 1 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert up.http.get("/health").status_code == up.http.get("/v1/models").status_code == 200
        with client_for(up.url) as client, pytest.raises(Exception, match="8 requests a minute"):
            client.chat.completions.create(**question())


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(1, 600))
def test_a_rate_is_never_exceeded(pauses: list[float], per_minute: float) -> None:
    rate, now, went = Rate(per_minute), 0.0, 0
    for pause in pauses:
        now += pause
        wait = rate.wait("a", now)
        went += not wait
        assert went <= max(1.0, per_minute / 4) + now * per_minute / 60 + 1e-6
        if wait:
            assert not rate.wait("a", now + wait + 1e-6), "who waits as told may come"
            went, now = went + 1, now + wait + 1e-6


def test_clients_are_forgotten_before_they_fill_the_memory() -> None:
    rate = Rate(60)
    for number in range(CLIENTS + 50):
        rate.wait(str(number), 0.0)
    assert len(rate._left) == CLIENTS


@pytest.mark.parametrize(
    ("address", "client"),
    [("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
     ("fe80::1%eth0", "fe80::/64"), ("", ""), ("testclient", "testclient")],
)  # fmt: skip
def test_whose_rate_counts(address: str, client: str) -> None:
    assert client_of({"client": (address, 1)}) == client
    assert client_of({"client": None}) == ""


# --- pages and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/C:%5cx", "/page/\\x",
     "/page/index.html%00.js", "/../../etc/passwd", "/page/", "/page", "/v1/models/../../etc/passwd"],
)  # fmt: skip
def test_no_path_of_a_request_reaches_a_file(up: Up, path: str) -> None:
    reply = up.raw(head(path, "GET", Connection="close"))
    status = int(reply.split()[1])
    assert status == 404 and b"root:" not in reply


def test_pages_are_served_as_they_were_packaged(up: Up) -> None:
    for path, (data, kind) in packaged().items():
        answer = up.http.get(path)
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, data, kind)
        assert answer.headers["content-security-policy"] == PAGE_POLICY
        again = up.http.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert up.http.head(path).status_code == 200


# --- the parts -------------------------------------------------------------------------------------------------------


def test_limits_are_positive() -> None:
    assert Limits(rate=0, drain_seconds=0).rate == 0
    for wrong in ({"images": 0}, {"rate": -1}, {"body_bytes": -5}, {"header_seconds": float("nan")}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]


def test_held_bytes_come_back() -> None:
    held = Held(10)
    assert held.take(10) and not held.take(1)
    held.give_back(10)
    assert held.take(1) and held.now == 1


@given(st.text())
def test_refusals_are_one_short_line(text: str) -> None:
    refusal = Refusal(429, text, wait=0.2)
    assert "\n" not in refusal.message and len(refusal.message) <= LONGEST
    assert refusal.headers["Retry-After"] == "1"
    json.dumps(refusal.body())


def test_a_page_can_read_why_it_was_refused_and_what_browsers_ask_first_costs_no_rate() -> None:
    there = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    where = Where(port=0, origins=("https://app.example",), token="t")
    with serving(where=where, limits=Limits(rate=8)) as up:
        for _ in range(6):
            asked = up.http.options("/v1/chat/completions", headers=there)
            assert asked.status_code == 200
        statuses = []
        for _ in range(3):
            got = up.post({}, headers=there)
            statuses.append(got.status_code)
            assert got.headers["access-control-allow-origin"] == "https://app.example"
        assert statuses == [401, 401, 429] and "retry-after" in got.headers["access-control-expose-headers"]


def test_an_address_of_ipv6_is_its_own_name() -> None:
    assert Where("fd00::5", hosts=["box.lan"]).names() == ["[fd00::5]", "box.lan"]
    door = Door(Limits(), Where("fd00::5", hosts=["box.lan"]).names(), None)
    door.check({"path": "/health", "method": "GET"}, {"host": "[fd00::5]:8000"})
    with pytest.raises(Refusal):
        door.check({"path": "/health", "method": "GET"}, {"host": "[fd00::6]:8000"})


def test_pictures_are_held_until_the_reply_is_sent() -> None:
    """Those that wait too: as they came, and unpacked."""
    heavy = picture(size=(300, 300), form="PNG") + b" " * 40_000
    with serving(limits=Limits(held_bytes=250_000, waiting=50), slots=1) as up:
        gate = threading.Event()
        up.service.live.soon(gate.wait)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(up.post, {"messages": about(heavy, text=f"what {number}")}) for number in range(8)]
            soon(lambda: sum(one.done() for one in asked) >= 1 and up.service.held.now > 100_000)
            gate.set()
            statuses = sorted(one.result().status_code for one in asked)
        assert statuses[0] == 200 and statuses[-1] == 429
        assert up.service.held.now == 0


def test_looks_leave_the_threads_to_others_and_only_so_many_wait() -> None:
    look = {"model": NAME, "messages": about(picture()), "answer": "red"}
    with serving() as up:
        gate = threading.Event()
        up.service.live.soon(gate.wait)
        with ThreadPoolExecutor(8) as pool:
            looks = [pool.submit(up.http.post, "/v1/look", json=look) for _ in range(6)]
            soon(lambda: sum(one.done() for one in looks) == 2)
            assert [one.result().status_code for one in looks if one.done()] == [429, 429]
            # It is prepared while they wait: only the model is held up.
            chat = pool.submit(up.post, {})
            soon(lambda: up.service.live.figures()["waiting"] == 1)
            gate.set()
            assert chat.result().status_code == 200
            assert sorted(one.result().status_code for one in looks) == [200] * 4 + [429] * 2
        assert up.service.looking == 0
