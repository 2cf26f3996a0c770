"""A server among enemies: some hundred hostile requests at each change, ten thousand where there is time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

import abuse_cases
from abuse import Case, Reply, Report, Size, Target, faults, grown, run
from fakes import tiny_vlm
from leveret.model.checkpoint import save

pytestmark = pytest.mark.serve

READERS = 8
"""Threads that the server reads requests in, where it may fetch pictures."""
LARGE = abuse_cases.encoded("PNG", (3000, 3000), color="blue")
"""Takes long enough to unpack that as many at once need as many threads."""
LIMITS = "header_seconds=2, pause_seconds=2, body_seconds=8, write_seconds=3"
START = """
import sys
from leveret.serve.limits import Limits
from leveret.serve.run import Where, serve
serve(sys.argv[1], Where(port=0), Limits({limits}), name="tiny", domains=["images.example.org"], precision="fp32",
      json_line=True)
"""


@contextlib.contextmanager
def up(folder: Path, limits: str) -> Iterator[tuple[Target, int]]:
    """`leveret serve` as a process of its own, so that its memory can be told from ours: (target, process)."""
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(limits=limits), str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told, "the server did not start"
        target = Target(json.loads(told)["url"])
        target.meet()
        # The threads that read requests are made when they are first needed: all of them, before anyone counts.
        with ThreadPoolExecutor(READERS) as crowd:
            answers = list(crowd.map(target.honest, [LARGE] * READERS))
        assert not any(answer.startswith("<") for answer in answers), answers
        yield target, process.pid
        assert process.poll() is None, "the server is gone"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vlm(), tmp_path_factory.mktemp("abuse") / "model")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[tuple[Target, int]]:
    with up(tiny, LIMITS) as found:
        yield found


def watched(pid: int) -> int | None:
    return pid if sys.platform == "linux" else None


def right(report: Report) -> None:
    assert not report.wrong, f"{report}"


def test_a_few_hundred_hostile_requests(server: tuple[Target, int]) -> None:
    target, pid = server
    report = run(target, abuse_cases.cases(random.Random(0), 150), abuse_cases.PICTURE, pid=watched(pid), every=50)
    right(report)
    assert report.total >= 150
    if report.sizes:
        # Of memory, too little was asked for to see a level; threads and files show what was left open.
        assert not grown(report.sizes[1:], memory=2000.0), f"{report}"


def test_nobody_behind_a_port_of_this_machine_is_ever_called(server: tuple[Target, int]) -> None:
    heard: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(0.2)
        done = threading.Event()

        def listen() -> None:
            while not done.is_set():
                try:
                    line, who = door.accept()
                except TimeoutError:
                    continue
                heard.append(who)
                line.close()

        listening = threading.Thread(target=listen)
        listening.start()
        try:
            right(run(server[0], abuse_cases.knocking(door.getsockname()[1]), abuse_cases.PICTURE))
        finally:
            done.set()
            listening.join()
    assert not heard


def test_all_spellings_of_other_places(server: tuple[Target, int]) -> None:
    right(run(server[0], abuse_cases.urls(), abuse_cases.PICTURE))


def by_schema(target: Target, count: int, number: int) -> Report:
    """Requests made from /openapi.json, right and wrong ones, held against what it promises."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    url = f"http://{target.host}:{target.port}"
    schema = schemathesis.openapi.from_dict(json.loads(target.request("GET", "/openapi.json").body))
    promised = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    ]  # fmt: skip
    report = Report()
    begun = time.monotonic()
    operations = [found.ok() for found in schema.get_all_operations()]
    # The completions are where there is much to get wrong: they get half of all.
    heavy = [operation for operation in operations if operation.method.upper() == "POST"]
    shares = [(operation, mode) for operation in operations for mode in schemathesis.GenerationMode]
    for operation, mode in shares:
        share = max(2, int(count * (0.9 if operation in heavy else 0.1) / (2 * (len(heavy) or 1))))

        @seed(number)
        @settings(
            max_examples=share if operation in heavy else max(2, share // 4), database=None, deadline=None,
            derandomize=False, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = target.model  # or all that is right but for its name stops there
            name = f"schema/{case.method} {case.path}"
            try:
                answer = case.call(base_url=url, timeout=60)
            except OSError as fault:  # requests' own faults are OSErrors too
                report.add(name, "no reply", [type(fault).__name__])
                return
            reply = Reply(answer.status_code, "", {k.lower(): v[0] for k, v in answer.headers.items()}, answer.content)
            found = faults(Case(name, lambda target: reply), reply)
            try:
                case.validate_response(answer, checks=promised)
            except Exception as broken:
                found.append(f"{broken}"[:600])
            report.add(name, str(answer.status_code), found)

        with contextlib.suppress(Unsatisfiable):  # where nothing can be given, nothing can be given wrongly
            one()
    report.seconds = time.monotonic() - begun
    return report


def test_requests_made_from_the_schema(server: tuple[Target, int]) -> None:
    report = by_schema(server[0], 150, 0)
    right(report)
    assert report.total > 100 and not server[0].honest(abuse_cases.PICTURE).startswith("<")


@pytest.mark.slow
def test_ten_thousand_hostile_requests(tiny: Path) -> None:
    """And at the end as much memory as after the warm-up."""
    with up(tiny, LIMITS) as (target, pid):
        before = run(target, abuse_cases.warm(random.Random(1)), abuse_cases.PICTURE, pid=watched(pid))
        right(before)
        right(by_schema(target, 2000, 1))
        report = run(target, abuse_cases.cases(random.Random(2), 8000), abuse_cases.PICTURE, pid=watched(pid))
        right(report)
        if report.sizes:
            time.sleep(3)  # the engine gives the rows' memory back when it was idle for a while
            sizes = [before.sizes[-1], *report.sizes, Size.of(pid)]
            assert not grown(sizes), f"{before}\n{report}\n{sizes[-1]}"
