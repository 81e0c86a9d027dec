"""/metrics: counters and histograms for Prometheus."""

from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import Content, Operation, Tag
from marketflow.api.rendering import ALWAYS

_METRICS = Tag("metrics", "Counters and histograms.")


def metrics_operations(times: RequestMetrics) -> list[Operation]:
    """The operation of this module."""

    async def metrics(request: Request) -> Response:
        from marketflow.api.exposed_metrics import exposition  # with the first scrape, see RequestMetrics

        content, content_type = exposition(context_of(request), times.registered, request.headers.get("accept", ""))
        return Response(content, headers={**ALWAYS, "content-type": content_type})

    return [
        Operation(
            id="metrics",
            path="/metrics",
            endpoint=metrics,
            tag=_METRICS,
            summary="Metrics for Prometheus",
            description="Prometheus text format, or OpenMetrics by `Accept`.",
            answer=Content(("text/plain", "application/openmetrics-text"), "Metrics, one a line.", {"type": "string"}),
        )
    ]
