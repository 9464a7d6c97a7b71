"""Endpoints of `tracereward serve`."""

import base64
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from scipy.special import expit

from tracereward import __version__
from tracereward.commands.score import as_row
from tracereward.errors import InputError
from tracereward.reports.verdicts import verdict_html
from tracereward.rewards.records import Trace
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores
from tracereward.serving.errors import add_errors
from tracereward.serving.json_body import JsonRoute
from tracereward.serving.middleware import DOCS, DOCS_FILES, Counted, Guard
from tracereward.serving.proxy import Proxy
from tracereward.serving.schemas import (
    Class,
    ClassifyRequest,
    ClassifyResponse,
    Document,
    Pooled,
    PoolingRequest,
    PoolingResponse,
    Ranked,
    RerankRequest,
    RerankResponse,
    Score,
    ScoreRequest,
    ScoreResponse,
    Usage,
)
from tracereward.serving.service import ERRORS, Service, Settings, unless_gone


def create_app(model: Scorer, settings: Settings) -> FastAPI:
    """Build the ASGI application."""
    service = Service(model, settings)
    proxy = None if settings.upstream is None else Proxy(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        service.ready = False
        await service.engine.stop()
        if proxy is not None:
            await proxy.close()

    app = FastAPIOffline(  # its page of the API's description loads nothing from the internet
        docs_url=DOCS,
        redoc_url=None,
        static_url=DOCS_FILES,
        title="tracereward",
        version=__version__,
        description="Token-level rewards of reasoning traces, reranking, and best-of-N.",
        lifespan=lifespan,
    )
    app.router.route_class = JsonRoute
    app.state.service = service
    app.add_middleware(
        Guard,
        api_key=settings.api_key,
        local_only=settings.local_only,
        max_bytes=settings.max_bytes,
        body_seconds=settings.body_seconds,
    )
    add_errors(app)
    app.add_middleware(Counted, seen=service.seen)
    _add_scoring(app, service)
    _add_operations(app, service, proxy)
    if proxy is not None:
        proxy.add_routes(app)
    return app


def _add_scoring(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/score", responses=ERRORS, response_model_exclude_unset=True)
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        """Token, step and trace rewards for traces of one prompt."""
        spans: Sequence[tuple[int, int]] = []
        prompt = service.render(body.prompt)
        if body.steps is not None:
            text, spans = service.model.settings.step_rule.join(body.steps)
            trace = Trace(where="steps", prompt=prompt, completion=text, finished=body.finished, spans=spans)
            field, texts, spans = "steps", [trace.completion], trace.spans
            body.finished = trace.finished
        elif body.candidates is not None:
            field, texts = "candidates", body.candidates
        else:
            field, texts = "completion", [body.completion or ""]
        service.check(body.model, len(texts), field)
        work = service.score(prompt, texts, field, body.finished)
        scores, usage = await unless_gone(request, work)
        results = []
        of_tokens = {"tokens", "offsets", "token_rewards", "step_ends"}
        fields = Score.model_fields.keys() - (set() if body.tokens else of_tokens)
        for index, one in enumerate(scores):
            try:
                row = as_row(one, service.model, spans=spans)
            except ValueError as e:  # no token lies within a step
                raise InputError(f"steps: {e}") from e
            results.append(Score(index=index, **{name: row[name] for name in fields if name in row}))
        return ScoreResponse(model=settings.name, results=results, usage=usage)

    @app.post("/v1/rerank", responses=ERRORS, response_model_exclude_none=True)
    @app.post("/v2/rerank", responses=ERRORS, response_model_exclude_none=True, include_in_schema=False)
    @app.post("/rerank", responses=ERRORS, response_model_exclude_none=True, include_in_schema=False)
    async def rerank(body: RerankRequest, request: Request) -> RerankResponse:
        """Rank documents as answers to the query, best first."""
        texts = [document if isinstance(document, str) else document.text for document in body.documents]
        service.check(body.model, len(texts), "documents")
        scores, usage = await unless_gone(request, service.score(service.render(body.query), texts, "documents"))
        rewards = [service.reward(one) for one in scores]
        order = sorted(range(len(texts)), key=lambda index: -rewards[index])[: body.top_n]
        results = [
            Ranked(
                index=index,
                relevance_score=service.relevance(rewards[index]),
                reward=rewards[index],
                document=_as_object(body.documents[index]) if body.return_documents else None,
            )
            for index in order
        ]
        return RerankResponse(id=f"rerank-{uuid.uuid4().hex}", model=settings.name, usage=usage, results=results)

    async def pooled(body: ClassifyRequest, request: Request) -> tuple[list[TokenScores], Usage, int]:
        """Scores of each input, usage, and the number of leading tokens without a score."""
        if body.messages is not None:
            service.check(body.model, 1)
            prompt = service.render(body.messages[:-1])
            work = service.score(prompt, [service.trace(body.messages[-1].fields())], "messages")
            return *await unless_gone(request, work), 0
        service.check(body.model, len(body.inputs), "input")
        return *await unless_gone(request, service.score_inputs(body.inputs)), 1

    @app.post("/pooling", responses=ERRORS)
    async def pooling(body: PoolingRequest, request: Request) -> PoolingResponse:
        """Token rewards of the last assistant message, or of each text. The first token of a text has no context, so
        its reward is 0."""
        scores, usage, before = await pooled(body, request)
        rows = [[0.0] * before + one.rewards for one in scores]
        if body.encoding_format == "base64":
            data = [base64.b64encode(np.asarray(row, "<f4").tobytes()).decode() for row in rows]
        else:
            data = [[[reward] for reward in row] for row in rows]
        pooled_rows = [Pooled(index=index, data=row) for index, row in enumerate(data)]
        return PoolingResponse(
            id=f"pool-{uuid.uuid4().hex}", created=int(time.time()), model=settings.name, data=pooled_rows, usage=usage
        )

    @app.post("/classify", responses=ERRORS)
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        """Classify each text as expert or policy by the sigmoid of its trace reward."""
        scores, usage, _ = await pooled(body, request)
        data = []
        for index, one in enumerate(scores):
            expert = float(expit(service.reward(one)))
            label = "expert" if expert > 0.5 else "policy"
            data.append(Class(index=index, label=label, probs=[1 - expert, expert]))
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}", created=int(time.time()), model=settings.name, data=data, usage=usage
        )


def _as_object(document: str | Document) -> Document:
    return Document(text=document) if isinstance(document, str) else document


def _add_operations(app: FastAPI, service: Service, proxy: Proxy | None) -> None:
    started = int(time.time())

    @app.get("/v1/models", responses={status: ERRORS[status] for status in (401, 421)})
    async def models() -> dict[str, Any]:
        """The served reward model and the upstream's models."""
        card = {"id": service.settings.name, "object": "model", "created": started, "owned_by": "tracereward"}
        upstream = [] if proxy is None else await proxy.upstream.models()
        return {"object": "list", "data": [card, *upstream]}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Liveness: the process is running."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"description": "Starting or shutting down."}})
    async def ready(response: Response) -> dict[str, str]:
        """Readiness: the model is loaded and has scored a trace."""
        if not service.ready:
            response.status_code = 503
        return {"status": "ready" if service.ready else "not ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    page, shown = files("tracereward.serving") / "page", verdict_html(service.settings.verdict).encode()
    for path, name, kind in (
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/page/page.js", "page.js", "text/javascript; charset=utf-8"),
        ("/page/page.css", "page.css", "text/css; charset=utf-8"),
    ):
        content = (page / name).read_bytes().replace(b"<!-- verdict -->", shown)

        def asset(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_api_route(path, asset, include_in_schema=False)
