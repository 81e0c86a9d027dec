"""/reload: reads the settings again, and takes other exchanges and symbols without a restart."""

from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.authorization import authorize
from marketflow.api.context import context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import Operation, Tag
from marketflow.api.problems import InvalidSettings, ServiceUnavailable, TooManyRequests
from marketflow.api.rendering import JSONAnswer
from marketflow.errors import SettingsError, Unavailable
from marketflow.settings.reloading import Changes

_SETTINGS = Tag("settings", "Exchanges and symbols, without a restart.")


def reload_operation(times: RequestMetrics) -> Operation:
    """Return the operation."""

    async def reload(request: Request) -> Response:
        authorize(request, times, "settings not reloaded", "A reload needs the configured bearer token.")
        try:
            return JSONAnswer(await context_of(request).reload())
        except SettingsError as error:
            raise InvalidSettings("; ".join(str(error).splitlines())) from None
        except Unavailable:
            raise ServiceUnavailable("Nothing is reloaded now: no ingest process answers.") from None

    return Operation(
        id="reload",
        method="POST",
        path="/reload",
        endpoint=reload,
        tag=_SETTINGS,
        summary="Read the settings again",
        description="Exchanges and symbols change at once; the feeds of all others lose no tick. Other keys that "
        "differ are named, and need a restart. If anything is wrong, nothing changes.",
        answer=Changes,
        problems=(InvalidSettings, ServiceUnavailable, TooManyRequests),
        asks_for_token=True,
    )
