"""OpenAI's chat completions, as far as this server follows them: what is read is checked here, once.

Whatever would change an answer and cannot be followed is refused; what changes nothing here (`user`, `metadata`, ...)
is taken and left. `null` stands for "not given", as many clients write it. Types are strict: "0.5" is no number.
The same classes make `/openapi.json`, so that what it says is what is done.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ANSWERS, STOPS, STOP_CHARACTERS, ALTERNATIVES, CHOICES, CHOICE_CHARACTERS = 8, 16, 128, 20, 64, 200
"""At most: answers of a request (`n`), stop strings and their length, `top_logprobs`, choices and their length."""

NEVER = 2**31 - 1
"""More tokens than any model answers with."""

Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Free = Annotated[dict[str, Any], Field(max_length=64)]


class Read(BaseModel):
    """What comes in."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Written(BaseModel):
    """What goes out."""

    model_config = ConfigDict(extra="forbid")


# --- messages ---------------------------------------------------------------------------------------------------------


class TextPart(Read):
    type: Literal["text"]
    text: str


class ImageUrl(Read):
    url: str = Field(min_length=1, description="data:image/png;base64,... (JPEG and WebP too)")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Taken, and makes no difference here.")


class ImagePart(Read):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Texts = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Read):
    role: Literal["system"]
    content: Texts
    name: str | None = None


class DeveloperMessage(Read):
    """OpenAI's newer name for the system's."""

    role: Literal["developer"]
    content: Texts
    name: str | None = None


class UserMessage(Read):
    role: Literal["user"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class AssistantMessage(Read):
    """An answer given before. The last five are how clients send back what they got; they must be empty."""

    role: Literal["assistant"]
    content: Texts
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None


Message = Annotated[SystemMessage | DeveloperMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


# --- the request ------------------------------------------------------------------------------------------------------


class StreamOptions(Read):
    include_usage: bool | None = Field(None, description="The last chunk before [DONE] tells the usage.")
    include_obfuscation: bool | None = Field(None, description="Taken, and makes no difference here.")


class PlainText(Read):
    type: Literal["text"]


class Schema(Read):
    """`schema` lists the answers allowed: `{"enum": ["A", "B"]}`, or an object with one such property."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: Free = Field(alias="schema")
    strict: bool | None = None


class Choices(Read):
    type: Literal["json_schema"]
    json_schema: Schema


ResponseFormat = Annotated[PlainText | Choices, Field(discriminator="type")]


_IDLE: Any = Field(None, description="Taken, and makes no difference here.")
_ONLY: Any = Field(None, description="Not supported: taken where it changes nothing.")


class ChatRequest(Read):
    """A conversation to go on with, and how."""

    model: str = Field(max_length=256, description="The name that /v1/models tells.")
    messages: list[Message] = Field(
        min_length=1,
        description="The conversation: the system's first, then user and assistant in turn; empty ones of "
        "the system's and the assistant's are left out.",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0, the likeliest answer, unless given.")
    top_p: float | None = Field(None, ge=0, le=1, description="Share of the likeliest that are drawn from; all, 1.")
    max_tokens: int | None = Field(None, ge=1, le=NEVER, description="More than the server allows means its limit.")
    max_completion_tokens: int | None = Field(None, ge=1, le=NEVER, description="OpenAI's newer name of the same.")
    stop: (
        Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]], Field(max_length=STOPS)]
        | None
    ) = Field(None, description="Strings that end the answer; they are no part of it.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Answer i of n draws with seed + i.")
    n: int | None = Field(None, ge=1, le=ANSWERS, description="Answers to the one prompt.")
    logprobs: bool | None = Field(None, description="Tell how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=ALTERNATIVES, description="And the likeliest others beside it.")
    response_format: ResponseFormat | None = Field(
        None,
        description="Text, or a choice between strings as a JSON schema: the likeliest of them is the answer, "
        "without temperature and stop.",
    )
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="With stream only.")
    # What changes nothing here.
    user: str | None = _IDLE
    metadata: Free | None = _IDLE
    store: bool | None = _IDLE
    service_tier: str | None = _IDLE
    safety_identifier: str | None = _IDLE
    prompt_cache_key: str | None = _IDLE
    prompt_cache_retention: str | None = _IDLE
    parallel_tool_calls: bool | None = _IDLE
    # What would change the answer, at the value where it does not.
    presence_penalty: Zero | None = _ONLY
    frequency_penalty: Zero | None = _ONLY
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = _ONLY
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = _ONLY
    tools: Nothing | None = _ONLY
    tool_choice: Literal["none", "auto"] | None = _ONLY
    functions: Nothing | None = _ONLY
    function_call: Literal["none", "auto"] | None = _ONLY
    audio: None = _ONLY
    prediction: None = _ONLY
    web_search_options: None = _ONLY


class LookRequest(Read):
    """Where did the model look while it said `answer` to this conversation?"""

    model: str | None = Field(None, max_length=256)
    messages: list[Message] = Field(min_length=1)
    answer: str = Field(min_length=1, max_length=20_000)


# --- the answer -------------------------------------------------------------------------------------------------------


class Alternative(Written):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative] = []


class Logprobs(Written):
    content: list[TokenLogprob] | None = None
    refusal: None = None


class AssistantSaid(Written):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]


class Choice(Written):
    index: int
    message: AssistantSaid
    logprobs: Logprobs | None = None
    finish_reason: Finish


class PromptDetails(Written):
    cached_tokens: int = Field(0, description="Of the prompt, those that were not computed again.")


class Usage(Written):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class ChatCompletion(Written):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelFacts(Written):
    parameters: int
    vision: bool
    max_images: int
    max_tokens: int = Field(description="Of one answer.")


class ModelCard(Written):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "leveret"
    leveret: ModelFacts


class ModelList(Written):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Written):
    status: Literal["ready", "draining"]


class ErrorFacts(Written):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Written):
    """What is said in place of an answer."""

    error: ErrorFacts
