"""A model behind an OpenAI-compatible endpoint, asked as the engine is: `answer(requests, on_prediction)`."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from leveret.generate.endpoint import Completion, Endpoint, Filtered, at_once
from leveret.images import ImageFault, decode, form_of, read_bytes
from leveret.records import IMAGE_MARK, ImageRef, Prediction, Turn
from leveret.runs import DataError, Interrupted, RecipeError, sha256_of

if TYPE_CHECKING:
    from leveret.generate.engine import Request

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")
"""Formats that every endpoint reads; others go as PNG, which loses nothing."""


class Remote:
    """Answers requests with a model behind an endpoint: greedily, several at once, each image as a data URI.

    parallel        requests at once.
    max_new_tokens  of an answer whose request does not say.
    fingerprint     of the address and the model's name: what is behind them cannot be seen from here.
    """

    def __init__(self, endpoint: Endpoint, *, parallel: int = 8, max_new_tokens: int = 64) -> None:
        self.endpoint, self.parallel, self.max_new_tokens = endpoint, parallel, max_new_tokens
        self.fingerprint = sha256_of(["openai", endpoint.url, endpoint.model])[:16]

    def answer(
        self, requests: Sequence[Request], on_prediction: Callable[[Prediction], None] | None = None
    ) -> list[Prediction]:
        """The answers in the order of `requests`; `on_prediction` gets each, in this thread, as soon as it has come.

        Prediction.meta: `tokens` (as the server counts them), `finish`: as the server says; "content_filter" where it
        refused to answer: the text is empty then, and how many there were is told on stderr.

        Raises:
            RecipeError: a request asks for the probabilities of choices, which an endpoint does not give.
            DataError: an image cannot be read; names the question.
            EnvironmentFault: the endpoint refuses, or is silent after all tries.
            Interrupted: a stop was asked for; what was under way has been waited for and given.
        """
        refuse_choices(requests, "an endpoint")
        numbers = range(len(requests))
        predictions: dict[int, Prediction] = {}
        stopped: Interrupted | None = None
        for number, prediction in at_once(numbers, lambda number: self._one(requests[number]), self.parallel):
            predictions[number] = prediction
            try:
                if on_prediction is not None:
                    on_prediction(prediction)
            except Interrupted as fault:  # the others under way are kept too
                stopped = fault
        if stopped is not None:
            raise stopped
        refused = [p.question_id for p in predictions.values() if p.meta["finish"] == "content_filter"]
        if refused:
            more = ", ..." if len(refused) > 10 else ""
            print(
                f"{self.endpoint.url}: its content filter refused {len(refused)} of {len(requests)} questions, whose "
                f"answers are empty: {', '.join(refused[:10])}{more}",
                file=sys.stderr,
            )
        return [predictions[number] for number in numbers]

    def _one(self, request: Request) -> Prediction:
        try:
            messages = [message(turn, images) for turn, images in shared_out(request)]
        except DataError as fault:
            raise DataError(f"question {request.question_id!r}: {fault}") from fault
        limit = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        try:
            said = self.endpoint.complete({"messages": messages, "temperature": 0.0, "max_tokens": limit})
        except Filtered:
            said = Completion("", finish="content_filter")
        meta = {"tokens": said.usage.get("completion_tokens"), "finish": said.finish}
        return Prediction(request.question_id, said.text.strip(), None, meta)


def refuse_choices(requests: Sequence[Request], who: str) -> None:
    """RecipeError where a request wants probabilities, which `who` does not give."""
    asked = [request.question_id for request in requests if request.choices is not None]
    if asked:
        raise RecipeError(
            f"{len(asked)} questions ask for the probabilities of choices (first {asked[0]!r}), which {who} does not "
            "give. Choose a rule of the task that reads text."
        )


def shared_out(request: Request) -> list[tuple[Turn, tuple[ImageRef, ...]]]:
    """Each turn with the images whose marks stand in it. DataError where marks and images do not match."""
    shared, start = [], 0
    for turn in request.turns:
        count = turn.text.count(IMAGE_MARK) if turn.role == "user" else 0
        shared.append((turn, request.images[start : start + count]))
        start += count
    if start != len(request.images):
        raise DataError(f"{start} {IMAGE_MARK} in the user turns for {len(request.images)} images")
    return shared


def pieces(turn: Turn) -> list[str | None]:
    """A turn cut at its image marks: None for an image, the words between as they were typed. The line end behind a
    mark is LLaVA's habit, no word of the question."""
    from leveret.inputs.template import ESCAPED

    cut: list[str | None] = []
    for number, words in enumerate(turn.text.split(IMAGE_MARK) if turn.role == "user" else [turn.text]):
        if number:
            cut.append(None)
            words = words.removeprefix("\n")
        if words:
            cut.append(words.replace(ESCAPED, IMAGE_MARK))
    return cut


def message(turn: Turn, images: Sequence[ImageRef]) -> dict[str, Any]:
    """A turn in OpenAI's form: plain text, or parts where there are images."""
    if not images:
        return {"role": turn.role, "content": "".join(words for words in pieces(turn) if words)}
    left = iter(images)
    parts = [
        {"type": "text", "text": words}
        if words is not None
        else {"type": "image_url", "image_url": {"url": data_uri(next(left))}}
        for words in pieces(turn)
    ]
    return {"role": turn.role, "content": parts}


def data_uri(ref: ImageRef) -> str:
    """An image as a data URI: its own bytes where every endpoint reads them and sees it upright, else as PNG.

    Raises ImageFault, which names the place."""
    data = read_bytes(ref)
    try:
        form, upright = form_of(data), decode(data)  # here, for a server that cannot read it would name no file
    except ImageFault as fault:
        raise fault.at(str(ref)) from None
    from PIL import Image as pil

    with pil.open(BytesIO(data)) as opened:
        turned = opened.getexif().get(0x0112, 1) not in (None, 0, 1)
    if turned or form not in SENT_AS_THEY_ARE:
        held = BytesIO()
        upright.save(held, "PNG")
        data, form = held.getvalue(), "PNG"
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode('ascii')}"
