"""An endpoint: patience, clear refusals, a key that stays where it is, and models behind it."""

from __future__ import annotations

import base64
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_fakes import Step, refused, said, serving
from leveret.generate import Request
from leveret.generate.endpoint import Endpoint, Filtered, _retry_after, at_once
from leveret.generate.others import open_other
from leveret.generate.remote import Remote, data_uri
from leveret.inputs.chat import literal
from leveret.records import ImageRef, Prediction, Turn
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError, graceful_stop

ASK = {"messages": [{"role": "user", "content": "?"}], "temperature": 0.0, "max_tokens": 3}


def endpoint(url: str, told: list[str] | None = None, **more: Any) -> Endpoint:
    lines = told if told is not None else []
    return Endpoint(url, "m", **{"first_wait": 0.01, "tries": 4, "timeout": 5.0, "tell": lines.append, **more})


def then(*steps: Step) -> Callable[[dict[str, Any], int], Step]:
    """One step after the other, the last for ever."""
    return lambda body, number: steps[min(number, len(steps) - 1)]


@pytest.mark.parametrize(
    "bad",
    [
        refused(429, "slow down"),
        refused(500, "oops"),
        refused(503, "busy", Retry_After="0.02"),
        refused(529),
        {"status": 200, "body": b"<html>welcome</html>"},
        {"status": 200, "body": b""},
        {"status": 200, "body": {"choices": []}},
        {"status": 200, "body": {"choices": [{"message": {"content": [1]}}]}},
        {"status": 200, "body": [1, 2]},
        said("half", "stop") | {"cut": 20},
        said("none") | {"cut": 0},
    ],
)
def test_what_passes_is_waited_for_and_told(bad: Step) -> None:
    told: list[str] = []
    with serving(then(bad, bad, said("yes"))) as server:
        reply = endpoint(server.url, told).complete(ASK)
    assert (reply.text, reply.model, reply.finish) == ("yes", "served", "stop")
    assert reply.usage == {"prompt_tokens": 10, "completion_tokens": 2}
    assert len(server.seen) == 3 and all(body == {"model": "m", **ASK} for body in server.seen)
    assert len(told) == 2 and all(server.url in line and "waiting" in line for line in told)
    assert server.paths == ["/v1/chat/completions"] * 3


def test_waits_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with serving(then(refused(500))) as server, pytest.raises(EnvironmentFault, match="gave up after 4 tries"):
        endpoint(server.url, told, first_wait=0.02).complete(ASK)
    waits = [float(line.split("waiting ")[1].split(" s")[0]) for line in told]
    assert len(server.seen) == 4 and len(told) == 3 and waits == sorted(waits)


def test_nobody_is_there() -> None:
    told: list[str] = []
    with pytest.raises(EnvironmentFault, match=r"no connection \(Connection refused\); gave up after 2 tries"):
        endpoint("http://127.0.0.1:9", told, tries=2).complete(ASK)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (refused(401, "bad key"), "bad key. No key was sent"),
        (refused(403, "not you"), "answers 403: not you"),
        (refused(404, "no such model"), "Is the model 'm' there"),
        (refused(400, "temperature must be 1"), "answers 400: temperature must be 1"),
        (refused(429, "pay", "insufficient_quota"), "no quota left"),
        (refused(429, "later", Retry_After="86400"), "asks to wait 86,400 s"),
        (refused(307, "", Location="http://elsewhere/v1"), "sends us on to http://elsewhere/v1"),
        ({"status": 422, "body": b"\xff\xfe no json"}, "answers 422"),
        ({"status": 400, "body": {"detail": [{"msg": "x"}]}}, "answers 400"),
        ({"status": 400, "body": {"error": "a text"}}, "answers 400: a text"),
    ],
)
def test_what_does_not_pass_is_told_at_once(step: Step, words: str) -> None:
    with serving(then(step)) as server, pytest.raises(EnvironmentFault) as caught:
        endpoint(server.url).complete(ASK)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(server.seen) == 1


def test_a_filtered_request_is_its_own_fault() -> None:
    with serving(then(refused(400, "no", "content_filter"))) as server, pytest.raises(Filtered):
        endpoint(server.url).complete(ASK)
    with serving(then(said(None, "content_filter"))) as server:
        assert endpoint(server.url).complete(ASK).text == ""


def test_newer_models_name_the_limit_otherwise() -> None:
    wrong = refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    with serving(lambda body, _: said("yes") if "max_completion_tokens" in body else wrong) as server:
        talker = endpoint(server.url)
        assert [talker.complete(ASK).text for _ in range(2)] == ["yes", "yes"]
    assert ["max_tokens" in body for body in server.seen] == [True, False, False]
    assert [body.get("max_completion_tokens") for body in server.seen] == [None, 3, 3]


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://h/v1", "http://", "http://u:secret@h/v1", "http://h/v1?key=secret", "http://h:x/v1"],
)
def test_urls_that_are_none_or_hold_a_secret(url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Endpoint(url, "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1/", "http://h:1/v1/chat/completions"])
def test_urls_that_mean_the_same(url: str) -> None:
    assert Endpoint(url, "m").url == "http://h:1/v1"


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-theirs")
    monkeypatch.setenv("MINE", "sk-mine")
    with serving(then(said("yes"))) as server:
        endpoint(server.url).complete(ASK)
        endpoint(server.url, key_env="MINE").complete(ASK)
    assert server.keys == [None, "Bearer sk-mine"]  # no stranger gets OpenAI's key
    with (
        serving(then(refused(401, "bad"))) as server,
        pytest.raises(EnvironmentFault, match="comes from MINE") as caught,
    ):
        endpoint(server.url, key_env="MINE").complete(ASK)
    assert "sk-mine" not in str(caught.value)
    monkeypatch.setenv("MINE", "two words")
    for name in ("MINE", "NOT_SET"):
        with pytest.raises(RecipeError, match=name):
            Endpoint(server.url, "m", key_env=name)


@given(st.text(max_size=40))
def test_any_retry_after_is_seconds_or_nothing(value: str) -> None:
    found = _retry_after(value)
    assert found is None or not found < 0


def test_retry_after_as_a_date() -> None:
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("soon") is None and _retry_after(None) is None and _retry_after("1.5") == 1.5


# --- several at once ------------------------------------------------------------------------------------------------


def test_jobs_run_at_once_and_a_fault_waits_for_the_others() -> None:
    together = threading.Barrier(3, timeout=5)
    assert sorted(at_once([1, 2, 3], lambda job: (together.wait(), job)[1], 3)) == [(1, 1), (2, 2), (3, 3)]
    assert list(at_once([], lambda job: job, 3)) == []

    begun, go = threading.Event(), threading.Event()

    def work(job: int) -> int:
        if job == 0:
            begun.wait(5)
            raise DataError("broken")
        begun.set()
        go.wait(0.2)
        return job

    came = []
    with pytest.raises(DataError, match="broken"):
        for job, _ in at_once([0, 1, 2, 3], work, 2):
            came.append(job)
        pytest.fail("not reached")
    assert came == [] or 1 in came  # what was under way is given; 2 and 3 were never begun
    assert 3 not in came


def test_ctrl_c_keeps_what_was_under_way() -> None:
    def work(job: int) -> int:
        if job == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)
        return job

    came = []
    with pytest.raises(Interrupted), graceful_stop():
        for job, _ in at_once(list(range(1000)), work, 2):
            came.append(job)
    assert 0 in came and len(came) < 1000


# --- a model behind it ----------------------------------------------------------------------------------------------


def picture(path: Path, form: str, **more: Any) -> ImageRef:
    from PIL import Image

    image = Image.new("RGB", (8, 6), (200, 40, 40))
    image.putpixel((0, 0), (0, 0, 255))
    image.save(path, form, **more)
    return ImageRef(str(path))


def opened(uri: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures_are_sent_as_they_are_or_upright(tmp_path: Path) -> None:
    from PIL import Image

    png = picture(tmp_path / "a.png", "PNG")
    assert data_uri(png) == "data:image/png;base64," + base64.b64encode(Path(png.path).read_bytes()).decode()
    assert data_uri(picture(tmp_path / "b.jpg", "JPEG")).startswith("data:image/jpeg;base64,")
    assert data_uri(picture(tmp_path / "c.bmp", "BMP")).startswith("data:image/png;base64,")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = opened(data_uri(picture(tmp_path / "d.jpg", "JPEG", exif=exif)))
    assert turned.size == (6, 8)
    (tmp_path / "e.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"e\.png"):
        data_uri(ImageRef(str(tmp_path / "e.png")))


def test_a_model_behind_an_endpoint_answers_requests(tmp_path: Path) -> None:
    ref = picture(tmp_path / "a.png", "PNG")
    requests = [
        Request(f"q{n}", (ref,), (Turn("user", f"<image>\n{literal(f'Is <image> {n} red?')}"),), max_new_tokens=5)
        for n in range(12)
    ] + [Request("text", (), (Turn("system", "be brief"), Turn("user", "2 + 2?")))]
    came: list[Prediction] = []
    with serving(lambda body, _: said(f" {body['max_tokens']}\n", "length")) as server:
        server.slow = 0.05
        remote = Remote(endpoint(server.url), parallel=4)
        answers = remote.answer(requests, came.append)
    assert [p.question_id for p in answers] == [r.question_id for r in requests]
    assert sorted(p.question_id for p in came) == sorted(r.question_id for r in requests)
    assert [answers[3].text, answers[-1].text] == ["5", "64"]
    assert answers[0].meta == {"tokens": 2, "finish": "length"}
    first = next(b for b in server.seen if isinstance(b["messages"][0]["content"], list))
    parts = first["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    assert parts[1]["text"].startswith("Is <image> ") and parts[0]["image_url"]["url"] == data_uri(ref)
    assert (first["temperature"], first["max_tokens"], first["model"]) == (0.0, 5, "m")
    last = next(b for b in server.seen if b["messages"][-1]["content"] == "2 + 2?")
    assert last["messages"][0] == {"role": "system", "content": "be brief"} and last["max_tokens"] == 64
    assert 1 < server.most_at_once <= 4
    assert len(remote.fingerprint) == 16 and remote.fingerprint != Remote(endpoint("http://h/v1")).fingerprint


def test_a_model_that_cannot_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda b, _: refused(400, "", "content_filter") if "bad" in str(b) else said("ok")) as server:
        remote = Remote(endpoint(server.url))
        answers = remote.answer([Request(n, (), (Turn("user", n),)) for n in ("good", "bad")])
        assert [(p.text, p.meta["finish"]) for p in answers] == [("ok", "stop"), ("", "content_filter")]
        assert "refused 1 of 2 questions" in capsys.readouterr().err
        missing = Request("q", (ImageRef(str(tmp_path / "none.png")),), (Turn("user", "<image>\n?"),))
        with pytest.raises(DataError, match=r"question 'q': .*none\.png"):
            remote.answer([missing])
        with pytest.raises(DataError, match="0 <image> in the user turns for 1 images"):
            remote.answer([Request("q", missing.images, (Turn("user", "?"),))])
        with pytest.raises(RecipeError, match="probabilities"):
            remote.answer([Request("q", (), (Turn("user", "?"),), choices=("a", "b"))])


@pytest.mark.parametrize("given_", ["openai:", "openai:http://h/v1", "openai:http://h/v1#", "openai:#m", "openai:h#m"])
def test_names_of_endpoints(given_: str) -> None:
    with pytest.raises(RecipeError, match="http://"):
        open_other(given_)


def test_names_that_mean_our_own_models(tmp_path: Path) -> None:
    found = open_other("openai:http://127.0.0.1:1/v1#some/model:8b", parallel=3)
    assert isinstance(found, Remote) and found.endpoint.model == "some/model:8b" and found.parallel == 3
    assert open_other("somebody/something") is None and open_other(str(tmp_path / "nothing")) is None
    assert open_other(str(tmp_path)) is None  # what is wrong with it is said where our models are read
    with pytest.raises(DataError, match=r"no config\.json"):
        open_other(f"hf:{tmp_path}")


@pytest.mark.parametrize("status", [200, 400])
def test_depth_without_end_is_an_answer_that_is_none(status: int) -> None:
    deep = b"[" * 200_000
    with serving(lambda *_: {"status": status, "body": deep}) as server, pytest.raises(EnvironmentFault):
        Endpoint(server.url, "m", tries=1).complete({"messages": []})
