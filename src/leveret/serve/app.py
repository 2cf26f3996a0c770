"""The application: routes, and what they need of one model.

GET  /                     the chat page, with its assets under /page
GET  /docs                 the API, explained by a page of our own from /openapi.json
GET  /health  /metrics     for who watches
GET  /v1/models            what answers here
POST /v1/chat/completions  a conversation goes on
POST /v1/look              where the model looked while it answered
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from leveret import __version__
from leveret.generate.live import Closed, Live, Prepared
from leveret.generate.look import look
from leveret.generate.model import Model
from leveret.model.vlm import VLM
from leveret.records import ImageRef, Turn
from leveret.serve import metrics as measured
from leveret.serve.answers import Answers, Gone, Stream, until_gone, whole
from leveret.serve.guard import PAGE_POLICY, Door, Guard, Visit
from leveret.serve.limits import Held, Limits, give_back
from leveret.serve.messages import Form, Manners, asks_of, turns_of
from leveret.serve.metrics import Metrics
from leveret.serve.pictures import Rules, picture
from leveret.serve.protocol import (
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    Health,
    LookRequest,
    ModelCard,
    ModelList,
)
from leveret.serve.refusals import INVALID, Refusal, busy, failed, of_fault, of_validation, shutting_down

log = logging.getLogger("leveret.serve")
Result = TypeVar("Result")
Body = TypeVar("Body", bound=BaseModel)

PREPARING = 2
"""Requests whose pictures are unpacked at once; eight where they are fetched, which is mostly waiting."""

LOOKS = 4
"""Looks that wait for the model or are done, at once; more get 429. Each holds up all answers for a pass."""

LOOKED = 2**20
"""Weights that one look tells, at most: 8 MB of JSON."""


@dataclass(slots=True)
class Service:
    """One model and all that a server knows beside it.

    name     what /v1/models tells, and requests must name.
    rules    which pictures are taken.
    """

    model: Model
    name: str
    limits: Limits = field(default_factory=Limits)
    rules: Rules = field(default_factory=Rules)
    live: Live = field(init=False)
    manners: Manners = field(init=False)
    metrics: Metrics = field(init=False)
    held: Held = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)
    created: int = field(init=False)
    parameters: int = field(init=False)
    draining: bool = False
    looking: int = 0

    def __post_init__(self) -> None:
        self.live = Live(self.model.engine, waiting=self.limits.waiting, idle=give_back)
        self.manners = Manners.of(self.vlm)
        self.metrics = Metrics(self.live.figures)
        self.held = Held(self.limits.held_bytes)
        self.metrics.held.set_function(lambda: self.held.now)
        self.pool = ThreadPoolExecutor(8 if self.rules.domains else PREPARING, "prepare")
        self.created = int(time.time())
        self.parameters = sum(weight.numel() for weight in self.vlm.parameters())

    @property
    def vlm(self) -> VLM:
        return self.model.vlm

    def close(self) -> None:
        """Ends what is being made. Call `live.drain` before, to let it end by itself."""
        self.draining = True
        self.live.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def card(self) -> dict[str, Any]:
        """As /v1/models tells it."""
        vision = bool(self.vlm.spec.towers)
        facts = {
            "parameters": self.parameters,
            "vision": vision,
            "max_images": self.limits.images if vision else 0,
            "max_tokens": self.limits.answer_tokens,
        }
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "leveret", "leveret": facts}

    def named(self, model: str) -> None:
        """Refusal for a model that is not here."""
        if model != self.name:
            raise Refusal(
                404, f"the model {model[:100]!r} is not here; this server has {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def read(self, body: bytes) -> tuple[ChatRequest, list[Prepared], Form | None]:
        """A body -> what the engine can answer. In a thread of `pool`: it unpacks pictures. Raises Refusal."""
        request = checked(ChatRequest, body)
        self.named(request.model)
        asks, form = asks_of(request, self.manners, self.limits, self.look_at)
        self.metrics.images.inc(len(asks[0].request.images))
        first = self.live.prepare(asks[0])
        return request, [first, *(first.again(ask.sampling) for ask in asks[1:])], form

    async def looked(self, receive: Receive, visit: Visit) -> dict[str, Any]:
        """Where the model looked: read and written in threads of `pool`, which is free for others while the engine's
        thread does the model's own part. Raises Gone and Refusal."""
        turns, images, answer = await self.aside(partial(self.look_asked, visit.take()), receive, visit)
        visit.keep(sum(len(ref.path) for ref in images))
        if self.looking >= LOOKS:
            raise busy(2)
        self.looking += 1
        try:
            work = self.live.soon(lambda: look(self.model, turns, images, answer, near=0, most=LOOKED))
            found = await self.awaited(asyncio.wrap_future(work), receive, visit)
            return await self.aside(found.as_json, receive, visit)
        except Closed:
            raise shutting_down() from None
        finally:
            self.looking -= 1

    def look_asked(self, body: bytes) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...], str | None]:
        """A body -> what `look` takes. In a thread of `pool`. Raises Refusal."""
        request = checked(LookRequest, body)
        if request.model is not None:
            self.named(request.model)
        turns, images = turns_of(request.messages, self.manners, self.limits, self.look_at)
        answer = request.answer
        spoken = 0 if answer is None else len(self.model.vlm.tokenizer.encode(answer, add_special_tokens=False))
        if spoken > self.limits.answer_tokens:
            raise Refusal(
                400, f"the answer has {spoken} tokens; this server looks into at most {self.limits.answer_tokens}",
                param="answer",
            )  # fmt: skip
        return turns, images, answer

    def look_at(self, url: str) -> Any:
        """The picture a request names; ImageFault."""
        return picture(url, self.rules)

    async def aside(self, work: Callable[[], Result], receive: Receive, visit: Visit) -> Result:
        """Do `work` in a thread of the pool. Raises Gone when the client leaves meanwhile, else Refusal."""
        return await self.awaited(asyncio.get_running_loop().run_in_executor(self.pool, work), receive, visit)

    async def awaited(self, done: asyncio.Future[Result], receive: Receive, visit: Visit) -> Result:
        """What `done` gives. Raises Gone when the client leaves meanwhile, else Refusal."""
        watch = asyncio.create_task(until_gone(receive))
        try:
            both: set[asyncio.Future[Any]] = {done, watch}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                done.cancel()  # where it has begun it goes on, for nobody
                raise Gone
            return done.result()
        except (Gone, Refusal):
            raise
        except Exception as fault:
            raise told(fault, visit.id) from None
        finally:
            watch.cancel()


def told(fault: Exception, request_id: str) -> Exception:
    """What to raise for a fault: a Refusal, or, of our own mistakes, the fault itself, which is then written down."""
    refusal = of_fault(fault, request_id)
    return fault if refusal.status == 500 else refusal


def checked(kind: type[Body], body: bytes) -> Body:
    """A body as `kind`. Raises Refusal. pydantic's reader takes at most 200 levels of depth, and no lone surrogates."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as fault:
        raise of_validation(fault.errors(include_url=False, include_context=False, include_input=False)) from None


# --- routes -----------------------------------------------------------------------------------------------------------

_REASONS = {
    400: "What was asked cannot be answered.",
    401: "The token is missing or another.",
    403: "The Host header names another server.",
    404: "There is no such model or page.",
    405: "Not with this method.",
    408: "The request took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests, of this client or of all.",
    500: "The server's own fault.",
    501: "This model's attention cannot be read.",
    503: "The server is shutting down, or has too many connections.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses}


def build(service: Service, *, token: bool = False) -> FastAPI:
    """The routes of one service, without the guard. token: say in the documentation that one is needed."""
    app = FastAPI(
        title="leveret", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        redirect_slashes=False, responses=_errors(403, 408, 503),
        description="A vision-language model behind OpenAI's chat completions.",
    )  # fmt: skip
    locked = _errors(401) if token else {}

    async def refused(request: Request, fault: Exception) -> Response:
        refusal = fault if isinstance(fault, Refusal) else of_status(fault)
        request.scope["leveret"].code = refusal.code or ""
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    async def broken(request: Request, fault: Exception) -> Response:
        visit: Visit = request.scope["leveret"]
        visit.code = "internal"
        log.error("%s: %s", visit.id, request.url.path[:200], exc_info=fault)
        return JSONResponse(failed(visit.id).body(), 500)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, broken)

    @app.get("/health", response_model=Health, responses={503: {"model": Health | ErrorBody}}, tags=["watch"])
    async def health(request: Request) -> Response:
        """Whether it answers. 503 while it drains: then no new work should be sent."""
        request.scope["leveret"].route = "health"
        status = "draining" if service.draining else "ready"
        return JSONResponse({"status": status}, 503 if service.draining else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **locked},
             tags=["watch"])  # fmt: skip
    async def prometheus(request: Request) -> Response:
        """Counters and times in Prometheus' text form."""
        request.scope["leveret"].route = "metrics"
        return Response(service.metrics.text(), headers={"Content-Type": measured.TYPE})

    @app.get("/v1/models", response_model=ModelList, responses=locked, tags=["OpenAI"])
    async def models(request: Request) -> Response:
        """The model that answers here."""
        request.scope["leveret"].route = "models"
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses={**_errors(404), **locked}, tags=["OpenAI"])
    async def model(request: Request) -> Response:
        """The same, by its name."""
        request.scope["leveret"].route = "models"
        service.named(request.path_params["model"])
        return JSONResponse(service.card())

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
                   **_errors(400, 404, 413, 415, 429, 500), **locked},
        openapi_extra=_takes(ChatRequest),
        tags=["OpenAI"],
    )  # fmt: skip
    async def completions(request: Request) -> Response:
        """Go on with a conversation; with `stream` as server-sent events: chunks, then `[DONE]`."""
        visit: Visit = request.scope["leveret"]
        visit.route = "completions"
        if service.draining:
            raise shutting_down()
        try:
            with service.metrics.prepared.time():
                read = await service.aside(partial(service.read, visit.take()), request.receive, visit)
            visit.keep(read[1][0].bytes)
            answers = Answers(
                service.live, read[1], read[0], read[2], service.name, visit.id,
                service.metrics.first.observe, service.metrics.ended,
            )  # fmt: skip
            del read
            try:
                answers.submit()
            except Exception as fault:
                raise told(fault, visit.id) from None
            if answers.request.stream:
                return Stream(answers)
            return JSONResponse(await whole(answers, request.receive))
        except Gone:
            visit.code = "client_left"
            return Response(status_code=400)  # nobody reads it

    @app.post(
        "/v1/look",
        responses={
            200: {"description": "docs/look.md explains it."},
            **_errors(400, 404, 413, 415, 429, 500, 501),
            **locked,
        },
        openapi_extra=_takes(LookRequest),
        tags=["leveret"],
    )
    async def looks(request: Request) -> Response:
        """Where the model looked at the pictures while it said an answer: attention, averaged over heads."""
        visit: Visit = request.scope["leveret"]
        visit.route = "look"
        if service.draining:
            raise shutting_down()
        try:
            return JSONResponse(await service.looked(request.receive, visit))
        except Gone:
            visit.code = "client_left"
            return Response(status_code=400)

    _pages(app)
    app.openapi = partial(_openapi, app, token)  # type: ignore[method-assign]
    return app


def guarded(service: Service, app: ASGIApp, door: Door) -> Guard:
    """The application as a server runs it."""
    return Guard(app, door, service.held, service.metrics)


def of_status(fault: Exception) -> Refusal:
    """Starlette's own refusals in our words."""
    status = getattr(fault, "status_code", 500)
    words = {404: "there is nothing here; GET /docs explains what is", 405: "not with this method"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    headers = getattr(fault, "headers", None) or {}
    return Refusal(status, words.get(status, "refused"), kind=INVALID, code=codes.get(status), headers=headers)


# --- what the documentation says --------------------------------------------------------------------------------------


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(app: FastAPI, token: bool) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        _, more = models_json_schema(
            [(ChatRequest, "validation"), (LookRequest, "validation")], ref_template="#/components/schemas/{model}"
        )
        schemas.update(more.get("$defs", {}))
        for path, methods in made["paths"].items():
            for facts in methods.values():
                _honest(facts)
                if token and (path.startswith("/v1/") or path == "/metrics"):
                    facts["security"] = [{"bearer": []}]
        if token:
            made["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema


def _honest(facts: dict[str, Any]) -> None:
    """FastAPI promises a 422 of its own where a path has a parameter; here there is none."""
    facts["responses"].pop("422", None)


# --- pages ------------------------------------------------------------------------------------------------------------

_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".webmanifest": "application/manifest+json",
    ".json": "application/json", ".woff2": "font/woff2",
}  # fmt: skip
_AT = {"index.html": "/", "docs.html": "/docs"}


def packaged() -> dict[str, tuple[bytes, str]]:
    """URL path -> (bytes, type) of every file of the page, read once: no request ever names a file."""
    found: dict[str, tuple[bytes, str]] = {}
    folder = files("leveret.serve").joinpath("page")
    for file in sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else ():
        kind = _TYPES.get(file.name[file.name.rfind(".") :])
        if file.is_file() and kind:
            found[_AT.get(file.name, f"/page/{file.name}")] = (file.read_bytes(), kind)
    return found


def _pages(app: FastAPI) -> None:
    for path, (data, kind) in packaged().items():
        app.router.routes.append(Route(path, _page(data, kind), methods=["GET"], include_in_schema=False))


def _page(data: bytes, kind: str) -> Callable[[Request], Any]:
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'

    async def page(request: Request) -> Response:
        request.scope["leveret"].route = "page"
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return page
