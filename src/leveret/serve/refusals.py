"""What a server says when it does not answer: OpenAI's form, fixed words, nothing of the inside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from leveret.generate.engine import ChoiceFault
from leveret.generate.gaze import Unreadable
from leveret.generate.live import Closed, Full
from leveret.images import ImageFault
from leveret.runs import DataError

INVALID, AUTH, LIMITED, OURS = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
"""OpenAI's kinds of errors."""

LONGEST = 600
"""Characters of a message: what a client sent may be quoted in it, and may be long."""


class Refusal(Exception):
    """A request that is not answered.

    status   of HTTP.
    message  for the person who wrote the client.
    kind     one of OpenAI's `type`s.
    param    the field that is at fault, as a path: `messages[0].content`.
    code     a word for programs.
    wait     seconds after which another try makes sense; told as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        wait: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.message = " ".join(message[:LONGEST].split())
        self.headers = dict(headers or {})
        if wait is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(wait)))

    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A request that is wrong and will be wrong again."""
    return Refusal(400, message, param=param, code=code)


def too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most:,} bytes; send fewer or smaller images", code="body_too_large")


def busy(wait: float) -> Refusal:
    return Refusal(
        429,
        "the server has as many requests as it can hold; try again later",
        kind=LIMITED,
        code="overloaded",
        wait=wait,
    )


def shutting_down() -> Refusal:
    return Refusal(
        503, "the server is shutting down; ask again when it is back", kind=OURS, code="server_shutdown", wait=5
    )


def failed(request_id: str) -> Refusal:
    return Refusal(
        500, f"something went wrong inside the server; its log has more under {request_id}", kind=OURS, code="internal"
    )


def of_fault(fault: BaseException, request_id: str) -> Refusal:
    """What is told of an exception. Texts of our own classes were written for users; of others nothing is told."""
    if isinstance(fault, Refusal):
        return fault
    if isinstance(fault, ImageFault):
        detail = f" ({fault.detail})" if fault.detail else ""
        return bad(f"image refused: {fault.reason}{detail}. {fault.mending}.", "messages", "invalid_image")
    if isinstance(fault, ChoiceFault):
        return bad(str(fault), "response_format.json_schema.schema")
    if isinstance(fault, DataError):
        return bad(str(fault), "messages")
    if isinstance(fault, Full):
        return busy(fault.retry_after)
    if isinstance(fault, Closed):
        return shutting_down()
    if isinstance(fault, Unreadable):
        return Refusal(501, str(fault), kind=OURS, code="attention_unreadable")
    return failed(request_id)


# --- what pydantic finds ----------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "tools": "tools are not supported",
    "tool_choice": "tools are not supported",
    "functions": "functions are not supported",
    "function_call": "functions are not supported",
    "audio": "audio is not supported",
    "modalities": "only the modality text is supported",
    "prediction": "predicted outputs are not supported",
    "logit_bias": "logit_bias is not supported",
    "presence_penalty": "a presence_penalty other than 0 is not supported",
    "frequency_penalty": "a frequency_penalty other than 0 is not supported",
    "web_search_options": "searching the web is not supported",
}
"""Fields of OpenAI's that would change the answer and that nothing here can follow."""

_TAGS = {"system", "developer", "user", "assistant", "text", "image_url"}
"""In lists whose entries are of several kinds pydantic names the kind behind the number; it is no field."""


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """The clearest of pydantic's findings about a body: the one deepest inside, as it knows best what was meant; where
    a field takes two kinds of values, what is wrong with the kind that was sent."""
    error = max(
        errors, key=lambda one: (one["type"] == "json_invalid", len(one["loc"]), not one["type"].endswith("_type"))
    )
    if error["type"] == "json_invalid":
        return bad("the body is no JSON: " + error["msg"].removeprefix("Invalid JSON: "), code="invalid_json")
    if error["type"] == "model_type" and not error["loc"]:
        return bad("the body must be a JSON object", code="invalid_json")
    path = where(error["loc"])
    first = path.partition(".")[0].partition("[")[0]
    if first in UNSUPPORTED:
        return bad(f"{UNSUPPORTED[first]} by this server", path, "unsupported_parameter")
    if error["type"] == "extra_forbidden":
        return bad(f"{path[:80]}: this server knows no such field", path[:80], "unknown_parameter")
    if error["type"] == "missing":
        return bad(f"{path}: this field is required", path, "missing_parameter")
    said = error["msg"]
    if error["type"] == "union_tag_invalid":
        told = re.search(r"tag '(.*)' found .* expected tags: (.*)$", said, re.DOTALL)
        said = f"given {told[1]!r}; allowed are {told[2]}" if told else said
    said = said.replace(" after validation", "")  # a word of pydantic's, not of who wrote the client
    return bad(f"{path}: {said[0].lower()}{said[1:]}", path, "invalid_value")


def where(loc: Sequence[int | str]) -> str:
    """A place in a body as people write it: `messages[0].content[1].image_url.url`."""
    path, last, skip = "", "", False
    for step in loc:
        if skip and step in _TAGS:
            skip = False
            continue
        skip = False
        if isinstance(step, int):
            path += f"[{step}]"
            skip = last in ("messages", "content")
        elif step != "str" and not step.startswith(
            ("list[", "str[", "str-", "function-", "tagged-union", "constrained", "nullable")
        ):
            path += f".{step}" if path else step
            last = step
    return path
