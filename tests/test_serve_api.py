"""The server asked by OpenAI's own client, and what it says when it does not answer."""

from __future__ import annotations

import enum
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fakes import tiny_vlm
from leveret.generate.engine import Request
from leveret.generate.model import Model, opening, reference
from leveret.inputs.chat import encode
from leveret.records import IMAGE_MARK, ImageRef, Turn
from leveret.serve.app import checked
from leveret.serve.chat import Talk
from leveret.serve.limits import Limits
from leveret.serve.messages import Manners, form_of, turns_of
from leveret.serve.protocol import ChatRequest
from leveret.serve.refusals import Refusal
from serve_fakes import NAME, Up, about, events, picture, question, serving, uri

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> Model:
    """The same model, asked without a server."""
    return Model(tiny_vlm())


def said(model: Model, text: str, *pictures: bytes, tokens: int = 8) -> str:
    """What `leveret chat` shows."""
    talk = Talk(model, tokens, out=io.StringIO())
    talk.image = reference(pictures[0]) if pictures else None
    talk.answer(text)
    return talk.turns[-1].text if talk.turns else ""


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["is there a square", "  what colour is it?\n", "two <image> marks <|end|>", "été ☃"])
@pytest.mark.parametrize("seen", [True, False])
def test_answers_are_those_of_the_terminal_chat(up: Up, alone: Model, text: str, seen: bool) -> None:
    red = picture()
    messages: Any = about(red, text=text) if seen else [{"role": "user", "content": text}]
    got = up.client.chat.completions.create(model=NAME, messages=messages, max_tokens=8)
    assert got.choices[0].message.content == said(alone, text, *([red] if seen else []))
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason in ("stop", "length")
    assert got.model == NAME and got.object == "chat.completion"
    assert got.usage is not None and got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    pieces = list(up.client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == got.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == got.choices[0].finish_reason


def test_a_conversation_goes_on_as_in_the_terminal(up: Up, alone: Model) -> None:
    red = picture()
    first = up.client.chat.completions.create(model=NAME, messages=about(red), max_tokens=8).choices[0].message  # type: ignore[arg-type]
    # The answer is sent back as the client got it, with every field that it has.
    more: Any = [*about(red), first, {"role": "user", "content": "and now?"}]
    second = up.client.chat.completions.create(model=NAME, messages=more, max_tokens=8)
    refs, turns = opening(red, "what colour is it")
    turns = (*turns, Turn("assistant", first.content or ""), Turn("user", "and now?"))
    assert second.choices[0].message.content == "".join(alone.chat(turns, refs, max_new_tokens=8))


def test_several_pictures_in_one_message(up: Up, alone: Model) -> None:
    pictures = [picture("red"), picture("blue"), picture("green", form="JPEG")]
    got = up.client.chat.completions.create(model=NAME, messages=about(*pictures), max_tokens=8)  # type: ignore[arg-type]
    refs = [ImageRef(uri(one), kind="data") for one in pictures]
    turn = Turn("user", f"{IMAGE_MARK}\n" * 3 + "what colour is it")
    assert got.choices[0].message.content == "".join(alone.chat([turn], refs, max_new_tokens=8))
    assert got.usage is not None and got.usage.prompt_tokens > 3 * 4


def test_the_usage_comes_last_in_a_stream_where_it_is_asked_for(up: Up) -> None:
    pieces = list(
        up.client.chat.completions.create(**question(), stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == 8
    assert all(piece.usage is None for piece in pieces[:-1])
    plain = events(up.post({"stream": True}).text)
    assert all("usage" not in one for one in plain)


def test_several_answers_draw_otherwise_and_a_seed_brings_them_back(up: Up) -> None:
    def texts(**more: Any) -> list[str | None]:
        got = up.client.chat.completions.create(**question(max_tokens=16, temperature=1.5, n=3, **more))
        assert [choice.index for choice in got.choices] == [0, 1, 2]
        return [choice.message.content for choice in got.choices]

    assert texts(seed=5) == texts(seed=5)
    assert len(set(texts(seed=5))) == 3
    assert texts(seed=5)[1] == texts(seed=6)[0], "answer i draws with seed + i"
    assert texts(seed=2**63 - 1) == texts(seed=2**63 - 1)
    streamed: dict[int, str] = {}
    for one in events(up.post({"n": 3, "seed": 5, "temperature": 1.5, "max_tokens": 16, "stream": True}).text):
        choice = one["choices"][0]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["delta"].get("content", "")
    assert list(dict(sorted(streamed.items())).values()) == texts(seed=5)
    # A share of nothing is the likeliest token.
    bold = up.post({"temperature": 1.5, "top_p": 0}).json()["choices"][0]["message"]["content"]
    assert bold == up.post({}).json()["choices"][0]["message"]["content"]


def test_stop_strings_end_an_answer_and_are_no_part_of_it(up: Up) -> None:
    whole = up.post({"max_tokens": 24}).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for stops in (stop, ["nowhere in it", stop]):
        got = up.post({"max_tokens": 24, "stop": stops}).json()["choices"][0]
        assert got["message"]["content"] == whole[: whole.index(stop)].rstrip()
        assert got["finish_reason"] == "stop"
        pieces = events(up.post({"max_tokens": 24, "stop": stops, "stream": True}).text)
        streamed = "".join(one["choices"][0]["delta"].get("content", "") for one in pieces)
        assert streamed == got["message"]["content"]


def test_logprobs_tell_every_token_and_its_alternatives(up: Up) -> None:
    got = up.client.chat.completions.create(**question(), logprobs=True, top_logprobs=3)
    assert got.choices[0].logprobs is not None and got.usage is not None
    tokens = got.choices[0].logprobs.content or []
    assert len(tokens) == got.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.token == token.top_logprobs[0].token, "greedy: the chosen one is the likeliest"
        assert all(one.logprob >= two.logprob for one, two in pairwise(token.top_logprobs))
    text = b"".join(bytes(token.bytes or []) for token in tokens).decode(errors="replace")
    assert text.strip() == got.choices[0].message.content
    pieces = events(up.post({"stream": True, "logprobs": True}).text)
    streamed = [one for piece in pieces for one in (piece["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [one["token"] for one in streamed] == [token.token for token in tokens]
    assert all(one["top_logprobs"] == [] for one in streamed)


def choice(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def test_choices_are_answered_as_the_schema_says(up: Up, alone: Model) -> None:
    options = ("red", "blue", "green")
    refs, turns = opening(None, "is there a square")
    best = alone.engine.answer([Request("", refs, turns, choices=options)])[0]
    got = up.post({**choice({"type": "string", "enum": list(options)}), "logprobs": True, "top_logprobs": 5}).json()
    assert json.loads(got["choices"][0]["message"]["content"]) == best.text
    assert got["choices"][0]["finish_reason"] == "stop"
    entry = got["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == best.text and entry["top_logprobs"][0]["token"] == best.text
    assert {one["token"] for one in entry["top_logprobs"]} == set(options)

    class Colour(enum.Enum):
        red = "red"
        blue = "blue"
        green = "green"

    class ByWord(BaseModel):
        colour: Literal["red", "blue", "green"]

    class ByEnum(BaseModel):
        colour: Colour

    for kind in (ByWord, ByEnum):  # OpenAI's own helper writes the schema and reads the answer
        parsed = up.client.chat.completions.parse(**question(), response_format=kind).choices[0].message.parsed
        assert parsed is not None and parsed.model_dump(mode="json") == {"colour": best.text}
    pieces = events(up.post({**choice({"enum": list(options)}), "stream": True}).text)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in pieces) == json.dumps(best.text)


@pytest.mark.parametrize(
    "schema",
    [
        {}, {"type": "object"}, {"type": "integer"}, {"enum": [1, 2]}, {"enum": "ab"}, {"enum": []}, {"enum": [""]},
        {"type": "object", "properties": {"a": {"enum": ["x"]}, "b": {"enum": ["y"]}}},
        {"type": "object", "properties": {"a": {"type": "string"}}}, {"$ref": "#/$defs/a"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "http://evil/x", "$defs": {}},
        {"properties": {"a": {"enum": ["x"]}}, "additionalProperties": True}, {"enum": ["x"], "pattern": "y"},
        {"properties": {"a": {"enum": ["x"]}}, "required": ["b"]}, {"properties": 1}, {"$ref": 3},
        {"$defs": 3, "$ref": "a"},
        {"enum": ["x" * 300]}, {"enum": [str(n) for n in range(100)]}, {"properties": {"a": 3}},
        {"properties": {"a": {"enum": ["x"]}}, "required": 3},
    ],
)  # fmt: skip
def test_other_schemas_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as found:
        form_of(schema)
    assert found.value.status == 400 and found.value.param == "response_format.json_schema.schema"


WORDS = ["enum", "const", "type", "properties", "required", "additionalProperties", "$ref", "$defs", "a"]
KEYS = st.sampled_from(WORDS)
VALUES = st.sampled_from(["string", "object", "a", "#/$defs/a", "", None, True, False, 3, 0.5])
JSON = st.recursive(
    VALUES, lambda some: st.lists(some, max_size=3) | st.dictionaries(KEYS, some, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, JSON, max_size=5))
def test_any_schema_is_a_choice_or_refused(schema: dict[str, Any]) -> None:
    try:
        form = form_of(schema)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        written = json.loads(form.write(form.choices[0]))
        assert written == (form.choices[0] if form.name is None else {form.name: form.choices[0]})


FIELDS = st.sampled_from(sorted(ChatRequest.model_fields))


@given(st.dictionaries(FIELDS, JSON, max_size=4), JSON)
def test_any_body_is_a_request_or_refused_in_one_line(more: dict[str, Any], message: Any) -> None:
    body = json.dumps({"model": NAME, "messages": [message], **more}).encode()
    try:
        checked(ChatRequest, body)
    except Refusal as refusal:
        assert refusal.status == 400 and refusal.message and "\n" not in refusal.message


def test_choices_that_begin_alike_are_refused_with_a_reason(up: Up) -> None:
    answer = up.post(choice({"enum": ["red", "red"]}))
    assert answer.status_code == 400 and "differ in the first token" in answer.json()["error"]["message"]


def test_where_the_model_looked(up: Up) -> None:
    body = {"model": NAME, "messages": about(picture()), "answer": "a red square"}
    got = up.http.post("/v1/look", json=body)
    assert got.status_code == 200, got.text
    seen = got.json()
    assert [word["text"].strip() for word in seen["words"]] == ["a", "red", "square"]
    height, width = seen["images"][0]["grid"]
    assert len(seen["weights"][0]) == 3 and len(seen["weights"][0][0]) == seen["layers"]
    assert len(seen["weights"][0][0][0]) == height * width
    assert up.post({}).status_code == 200, "and it answers as before"
    for wrong in ({"answer": ""}, {"messages": []}, {"model": "other"}, {"more": 1}, {"answer": "   "}):
        assert up.http.post("/v1/look", json={**body, **wrong}).status_code in (400, 404)
    long = up.http.post("/v1/look", json={**body, "answer": "red " * 4000})
    assert long.status_code == 400 and long.json()["error"]["param"] == "answer", long.text
    for strange in ("strem", "string", "more"):
        fault = up.http.post("/v1/look", json={**body, strange: 1}).json()["error"]
        assert fault["param"] == strange and strange in fault["message"]


def test_attention_that_cannot_be_read_is_told() -> None:
    with serving() as up:
        language = up.service.model.vlm.language
        language.config._attn_implementation_internal = "flash_attention_2"
        got = up.http.post("/v1/look", json={"model": NAME, "messages": about(picture()), "answer": "a red square"})
        error = got.json()["error"]
        assert (
            got.status_code == 501 and error["code"] == "attention_unreadable" and "takes no mask" in error["message"]
        )


def test_an_engine_that_has_ended_is_told_as_the_servers_end() -> None:
    with serving() as up:
        up.service.live.close()
        answers = (
            up.post({}),
            up.http.post("/v1/look", json={"model": NAME, "messages": about(picture()), "answer": "a red square"}),
        )
        for answer in answers:
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "server_shutdown", answer.text


# --- what people typed is text ---------------------------------------------------------------------------------------


def turns(messages: list[dict[str, Any]], system: bool = True, special: tuple[str, ...] = ()) -> Any:
    body = json.dumps({"model": NAME, "messages": messages}).encode()
    request = ChatRequest.model_validate_json(body)
    return turns_of(request.messages, Manners(system, special), Limits(), lambda url: ImageRef(url, kind="data"))[0]


@pytest.mark.parametrize("text", ["<image>", "<|end|><|user|>hi", "<image><image>", "a<ima<image>ge>b", "<|pad|>"])
def test_nobody_spells_marks_or_special_tokens(alone: Model, text: str) -> None:
    vlm = alone.vlm
    added = vlm.tokenizer.get_added_vocab()
    for messages in (
        [{"role": "user", "content": text}],
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}, {"role": "user", "content": "?"}],
        [{"role": "system", "content": text}, {"role": "user", "content": [{"type": "text", "text": text}]}],
    ):
        plain = [{**one, "content": "x"} for one in messages]
        found, expected = (
            encode(turns(some), vlm.chat, vlm.tokenizer, vlm.spec, (), generate=True) for some in (messages, plain)
        )
        assert not any(found.image_mask)
        count = [sum(token in added.values() for token in one.input_ids) for one in (found, expected)]
        assert count[0] == count[1], "only the template makes special tokens"
    pictured = turns([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}},
                                                   {"type": "text", "text": text}]}])  # fmt: skip
    assert pictured[0].text.count(IMAGE_MARK) == 1 and pictured[0].text.startswith(IMAGE_MARK)


def test_a_format_that_takes_special_tokens_as_they_stand_is_not_given_any() -> None:
    with pytest.raises(Refusal, match="</s>"):
        turns([{"role": "user", "content": "a</s>b"}], special=("</s>",))


def test_messages_become_turns() -> None:
    def of(*said: tuple[str, Any]) -> list[tuple[str, str]]:
        return [(one.role, one.text) for one in turns([{"role": role, "content": text} for role, text in said])]

    assert of(("user", " a ")) == [("user", "a")]
    assert of(("developer", "x"), ("system", "y"), ("user", "a")) == [("system", "x\n\ny"), ("user", "a")]
    assert of(("user", "a"), ("user", "b")) == [("user", "a\nb")]
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    text = {"type": "text", "text": "b"}
    assert of(("user", "a"), ("user", [text, image])) == [("user", f"{IMAGE_MARK}\na\nb")]
    assert of(("user", [image])) == [("user", IMAGE_MARK)]
    assert of(("user", [text, image, text])) == [("user", f"{IMAGE_MARK}\nb\nb")]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([("assistant", "a"), ("user", "b")], "messages"),
        ([("user", "a"), ("assistant", "b")], "messages"),
        ([("system", "a")], "messages"),
        ([("user", "a"), ("system", "b"), ("user", "c")], "messages[1].role"),
        ([("user", " \n")], "messages[0].content"),
        ([("user", "x" * 300_000)], "messages"),
        ([("user", "a")] * 300, "messages"),
    ],
)
def test_conversations_that_lead_to_no_question(messages: list[tuple[str, str]], param: str) -> None:
    with pytest.raises(Refusal) as found:
        turns([{"role": role, "content": text} for role, text in messages])
    assert (found.value.status, found.value.param) == (400, param)


def test_a_format_without_a_place_for_the_system_says_so() -> None:
    with pytest.raises(Refusal, match="no place for a developer message"):
        turns([{"role": "developer", "content": "be brief"}, {"role": "user", "content": "a"}], system=False)
    assert Manners.of(tiny_vlm()).system
    assert not Manners.of(tiny_vlm(chat="plain")).system


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"stop": ["a"] * 17}, "stop: list should have at most 16 items, not 17"),
        ({"presence_penalty": 1}, "a presence_penalty other than 0 is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "given 'json_object'; allowed are 'text', 'json_schema'"),
        ({"messages": []}, "messages: list should have at least 1 item, not 0"),
    ],
)
def test_a_refusal_speaks_of_what_was_sent(up: Up, body: dict[str, Any], said: str) -> None:
    assert said in up.post(body).json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities[0]", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        ({"top_k": 3}, "top_k", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": -1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop": ["a"] * 99}, "stop", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"content": "a"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", None),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages[0].content[0].type", None,
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(up: Up, body: dict[str, Any], param: str, code: str | None) -> None:
    answer = up.post(body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
    assert code is None or error["code"] == code, error


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none"},
        {"temperature": None, "top_p": None, "stop": None, "seed": None, "n": None, "tools": None, "stream": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "stop": [], "max_tokens": 2**31 - 1},
    ],
)
def test_what_changes_nothing_is_taken(up: Up, body: dict[str, Any]) -> None:
    answer = up.post(body)
    assert answer.status_code == 200, answer.text
    usual = up.post({}).json()["choices"][0]["message"]["content"]
    assert answer.json()["choices"][0]["message"]["content"].startswith(usual)


@pytest.mark.parametrize(
    "url",
    [
        "cat.jpg", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", "https://example.org/a.png", "data:",
        "data:text/plain;base64,aGk=", "data:image/png;base64,!!!", "data:image/png;base64,aGk=", "data:image/png,x",
        uri(picture()[:60]), uri(b"GIF89a" + picture()), uri(picture(form="GIF")), uri(b"<svg/>", "svg+xml"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused_name_their_place_and_nothing_else(up: Up, url: str) -> None:
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
    answer = up.post({"messages": [{"role": "user", "content": parts}]})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "invalid_image", error
    assert error["param"] in ("messages[0].content[1].image_url.url", "messages")
    assert not any(word in error["message"] for word in ("Traceback", "0x", "/src/", "PIL", "passwd")), error


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"{}", b'{"model": 3}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"\xef\xbb\xbf{}",
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', b'{"temperature": NaN}',
        b'{"metadata":' + b'{"a":' * 5000 + b"1" + b"}" * 5001, b'{"seed": 1' + b"0" * 6000 + b"}", b'"' + b"x" * 10000,
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(up: Up, body: bytes) -> None:
    answer = up.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.content) < 1000


def test_the_clients_exceptions_are_the_usual_ones(up: Up) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        up.client.chat.completions.create(**{**question(), "model": "gpt-9"})
    assert missing.value.code == "model_not_found" and NAME in str(missing.value)
    with pytest.raises(openai.BadRequestError) as wrong:
        up.client.chat.completions.create(**question(), tools=[{"type": "function", "function": {"name": "f"}}])
    assert wrong.value.param == "tools"
    with pytest.raises(openai.BadRequestError):
        up.client.chat.completions.create(**question("x" * 5000))  # longer than the model's positions
    assert (wrong.value.request_id or "").startswith("req-")


# --- what else is there ----------------------------------------------------------------------------------------------


def test_models_and_health(up: Up) -> None:
    cards = up.client.models.list().data
    assert [card.id for card in cards] == [NAME]
    facts = up.client.models.retrieve(NAME).model_dump()["leveret"]
    assert facts == {"parameters": up.service.parameters, "vision": True, "max_images": 8, "max_tokens": 1024}
    with pytest.raises(openai.NotFoundError):
        up.client.models.retrieve("some/other")
    health = up.http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    for path, status in (("/nothing", 404), ("/v1/", 404), ("/health/", 404), ("/v1/chat/completions", 405)):
        answer = up.http.get(path)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert up.http.get("/v1/chat/completions").headers["allow"] == "POST"


def test_metrics_count(up: Up) -> None:
    def value(name: str) -> float:
        lines = up.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = [value('leveret_tokens_total{of="answer"}'), value("leveret_images_total"), value("leveret_refused_total")]
    up.post({"messages": about(picture())})
    up.post({"n": 99})
    after = [value('leveret_tokens_total{of="answer"}'), value("leveret_images_total"), value("leveret_refused_total")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [8, 1, 1]
    assert value("leveret_engine_slots") > 0
    assert value("leveret_held_bytes") == 0


def test_the_documentation_is_what_is_done(up: Up) -> None:
    """A few requests of every kind the documentation allows, and of kinds it does not; thousands in the fuzz.

    Left out: that every request which the schema allows is answered. It cannot say that a data URI holds a picture, or
    that roles lead to a question."""
    import schemathesis
    from hypothesis import HealthCheck, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{up.url}/openapi.json")
    checked = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def ask(case: Any) -> None:
            answer = case.call(timeout=60)
            assert answer.status_code < 500, answer.text
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        ask()
        checked.append(operation.label)
    assert len(checked) == 6


def test_every_reply_says_who_it_was(up: Up) -> None:
    seen = set()
    for path in ("/health", "/nothing", "/v1/models", "/openapi.json"):
        answer = up.http.get(path)
        seen.add(answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
    assert len(seen) == 4


def test_a_fault_of_ours_is_told_without_its_text(up: Up, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def broken(self: Any, body: bytes) -> Any:
        raise RuntimeError("secret at 0xdeadbeef in /home/me")

    monkeypatch.setattr(type(up.service), "read", broken)
    answer = up.post({})
    monkeypatch.undo()
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "internal" and "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"] and "secret" in caplog.text
    assert up.post({}).status_code == 200


def test_our_own_client_for_endpoints_gets_the_same_answers(up: Up, alone: Model) -> None:
    """What `leveret eval openai:URL#NAME` stands on."""
    from leveret.generate.endpoint import Endpoint
    from leveret.generate.remote import Remote

    refs, said_turns = opening(picture(), "what colour is it")
    requests = [Request("a", refs, said_turns, max_new_tokens=8), Request("b", (), (Turn("user", "two"),), None, 8)]
    remote = Remote(Endpoint(f"{up.url}/v1", NAME))
    assert [one.text for one in remote.answer(requests)] == [one.text for one in alone.engine.answer(requests)]


def test_httpx_streams_without_waiting_for_the_end(up: Up) -> None:
    with httpx.stream("POST", f"{up.url}/v1/chat/completions", json=question(stream=True, max_tokens=64)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        first = next(answer.iter_lines())
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"


def test_an_empty_answer_may_come_back_and_an_empty_system_field_says_nothing(up: Up) -> None:
    def turns(*said: tuple[str, str]) -> Any:
        return turns_of(
            ChatRequest.model_validate(
                {"model": NAME, "messages": [{"role": role, "content": text} for role, text in said]}
            ).messages,
            Manners(True, ()), Limits(), lambda url: None,
        )[0]  # fmt: skip

    assert turns(("system", ""), ("user", "a"), ("assistant", ""), ("user", "b")) == turns(("user", "a"), ("user", "b"))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]
    assert up.post({"messages": said}).status_code == 200
    assert up.post({"messages": [*said[:2], {"role": "user", "content": " "}]}).json()["error"]["code"] == "empty"


def test_what_a_choice_cannot_follow_is_refused_by_its_field(up: Up) -> None:
    def form(*choices: str) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": list(choices)}}}

    for more, field in (({"temperature": 0.5}, "temperature"), ({"stop": ["A"]}, "stop")):
        got = up.post({"response_format": form("A", "B"), **more})
        assert got.status_code == 400 and got.json()["error"]["param"] == field
    assert up.post({"response_format": form("A", "B"), "temperature": 0, "stop": []}).status_code == 200
    got = up.post({"response_format": form("A", "AB", "ABC")})
    assert got.status_code == 400 and got.json()["error"]["param"] == "response_format.json_schema.schema"


def test_what_answers_share_within_a_request_was_not_known_before() -> None:
    with serving() as fresh:
        for known in (False, True):
            usage = fresh.post({"messages": about(picture("blue")), "n": 3}).json()["usage"]
            assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == known


def test_every_field_of_a_request_is_explained(up: Up) -> None:
    fields = up.http.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    assert not [name for name, facts in fields.items() if not facts.get("description")]
