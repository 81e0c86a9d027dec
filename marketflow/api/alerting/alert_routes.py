"""/alerts: rules and their events."""

from http import HTTPStatus
from typing import Annotated

import msgspec
from loguru import logger
from msgspec import Meta
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from marketflow.alerts.alert_model import (
    MOST_RULES,
    AlertRule,
    Origin,
    StoredRule,
    receiver_of,
    without_webhook,
)
from marketflow.alerts.rule_parsing import InvalidRule, UnknownName, decode_rule, known_names
from marketflow.api.alerting.event_answer import EventAnswer, event_answer
from marketflow.api.authorization import authorize, client_of
from marketflow.api.context import Context, context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import Operation, Parameter, Tag
from marketflow.api.problems import Problem, ServiceUnavailable, TooManyRequests, UnknownExchange, UnknownSymbol
from marketflow.api.queries.candle_parameters import MOST, InvalidLimit, parse_limit
from marketflow.api.queries.feed_parameters import MOST_OFFSET_DIGITS
from marketflow.api.rendering import JSONAnswer, Time, rfc3339
from marketflow.cluster.messages import RuleChange
from marketflow.errors import Unavailable

LIMIT = 100

_ALERTS = Tag("alerts", "Rules of what is watched, and their events.")

AFTER = Parameter(
    "after",
    "Only those with a number above this one: `next_after` of the page before.",
    {"type": "integer", "minimum": 0, "maximum": 10**MOST_OFFSET_DIGITS - 1},
    (0,),
)
_LIMIT = Parameter(
    "limit",
    f"How many at most; {LIMIT} without it.",
    {"type": "integer", "minimum": 1, "maximum": MOST, "default": LIMIT},
    (LIMIT, 1, MOST),
)

_BODY = """\
The body is the rule as JSON, of the kind that `kind` names. With a `webhook`, its events are posted there until it
answers with a status of 200 to 299: the event as JSON, with its id as `Idempotency-Key`, `Marketflow-Timestamp` (Unix
seconds) and `Marketflow-Signature`, which is `v1=` and the HMAC-SHA256, in hex, of the timestamp, a point and the body
by its `secret`. An event may come more than once."""


class RuleAnswer(msgspec.Struct, frozen=True):
    """A rule, and what it has done. Its webhook and secret are left out."""

    number: Annotated[int | None, Meta(description="Its place among all rules; null of one that was just made.")]
    id: str
    origin: Annotated[Origin, Meta(description="Whether it is from the settings or was made by this API.")]
    rule: AlertRule
    receiver: Annotated[str, Meta(description="Scheme, host and port of its webhook; empty without one.")]
    done: Annotated[bool, Meta(description="Whether it is a rule with `once` that has had its event.")]
    last_event_at: Annotated[Time | None, Meta(description="Time of its last event.")]


class RulesAnswer(msgspec.Struct, frozen=True):
    """Rules in the order in which they were made."""

    rules: list[RuleAnswer]
    next_after: Annotated[int | None, Meta(description="The `after` of the next page; null on the last one.")]


class DeletedRule(msgspec.Struct, frozen=True):
    """The rule that was deleted."""

    id: str


class EventsAnswer(msgspec.Struct, frozen=True):
    """Events in the order in which they were stored; the newest ones without `after`."""

    events: list[EventAnswer]
    next_after: Annotated[int | None, Meta(description="The `after` of the events that follow; null without any.")]


class InvalidAlertRule(Problem):
    """The body is not a rule; `detail` says why."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_rule"


class InvalidAfter(Problem):
    """`after` is not a whole number."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_after"


class UnknownRule(Problem):
    """No rule has this id."""

    status = HTTPStatus.NOT_FOUND
    code = "unknown_rule"


class ConfiguredRule(Problem):
    """The rule is from the settings, which alone may change it."""

    status = HTTPStatus.CONFLICT
    code = "configured_rule"


class TooManyRules(Problem):
    """There are as many rules as there may be."""

    status = HTTPStatus.CONFLICT
    code = "too_many_rules"


_REFUSALS: dict[str, Problem] = {
    "unknown_rule": UnknownRule("No rule has this id."),
    "configured_rule": ConfiguredRule("This rule is from the settings; change it there."),
    "too_many_rules": TooManyRules(f"There are {MOST_RULES} rules already."),
    "unavailable": ServiceUnavailable("Rules cannot be changed now: PostgreSQL cannot be used."),
}

_OF_BODY = (InvalidAlertRule, UnknownExchange, UnknownSymbol)
_OF_CHANGE = (ServiceUnavailable, TooManyRequests)


def alert_operations(times: RequestMetrics) -> list[Operation]:
    """Return the operations of this module."""

    async def create(request: Request) -> Response:
        _authorize(request, times)
        rule = await _rule_of(request)
        id = await _changed(request, RuleChange("create", "", rule))
        return JSONAnswer(_made(id, rule), HTTPStatus.CREATED)

    async def replace(request: Request) -> Response:
        _authorize(request, times)
        rule = await _rule_of(request)
        id = await _changed(request, RuleChange("replace", request.path_params["rule"], rule))
        return JSONAnswer(_made(id, rule))

    async def delete(request: Request) -> Response:
        _authorize(request, times)
        return JSONAnswer(DeletedRule(await _changed(request, RuleChange("delete", request.path_params["rule"]))))

    return [
        Operation(
            id="alertRules",
            path="/alerts",
            endpoint=_rules,
            tag=_ALERTS,
            summary="All alert rules",
            description="Those of the settings and those made here. They are about the mode that runs.",
            answer=RulesAnswer,
            query=(AFTER, _LIMIT),
            problems=(InvalidAfter, InvalidLimit, ServiceUnavailable, TooManyRequests),
        ),
        Operation(
            id="createAlertRule",
            method="POST",
            path="/alerts",
            endpoint=create,
            tag=_ALERTS,
            summary="Make an alert rule",
            description=f"It is evaluated when the answer is sent. {_BODY}",
            answer=RuleAnswer,
            status=HTTPStatus.CREATED,
            body=AlertRule,
            problems=(*_OF_BODY, TooManyRules, *_OF_CHANGE),
            asks_for_token=True,
        ),
        Operation(
            id="alertEvents",
            path="/events/alerts",
            endpoint=_events,
            tag=_ALERTS,
            summary="Events of alerts",
            description="Kept for 90 days. The newest `limit` without `after`.",
            answer=EventsAnswer,
            query=(AFTER, _LIMIT),
            problems=(InvalidAfter, InvalidLimit, ServiceUnavailable, TooManyRequests),
        ),
        Operation(
            id="alertRule",
            path="/alerts/{rule}",
            endpoint=_rule,
            tag=_ALERTS,
            summary="An alert rule",
            answer=RuleAnswer,
            problems=(UnknownRule, ServiceUnavailable, TooManyRequests),
        ),
        Operation(
            id="replaceAlertRule",
            method="PUT",
            path="/alerts/{rule}",
            endpoint=replace,
            tag=_ALERTS,
            summary="Replace an alert rule",
            description=f"By one that has done nothing yet, with the same id. {_BODY}",
            answer=RuleAnswer,
            body=AlertRule,
            problems=(*_OF_BODY, UnknownRule, ConfiguredRule, *_OF_CHANGE),
            asks_for_token=True,
        ),
        Operation(
            id="deleteAlertRule",
            method="DELETE",
            path="/alerts/{rule}",
            endpoint=delete,
            tag=_ALERTS,
            summary="Delete an alert rule",
            description="Its events stay; those that its webhook has not acknowledged are not posted any more.",
            answer=DeletedRule,
            problems=(UnknownRule, ConfiguredRule, *_OF_CHANGE),
            asks_for_token=True,
        ),
    ]


def parse_after(text: str | None) -> int | None:
    """Return the number of `after`, None without it.

    Raises:
        InvalidAfter: it is none.
    """
    if text is None:
        return None
    digits = text.lstrip("0") if text.isascii() else ""
    if text.isdecimal() and text.isascii() and len(digits) <= MOST_OFFSET_DIGITS:
        return int(digits or "0")
    raise InvalidAfter(f"`after` is a whole number from 0 to {10**MOST_OFFSET_DIGITS - 1}.")


# Reading


def _page(request: Request, query: QueryParams) -> tuple[Context, int | None, int]:
    context = context_of(request)
    after, limit = parse_after(query.get("after")), parse_limit(query.get("limit"), LIMIT)
    context.clients.attribute_to(request.scope)
    context.clients.charge(limit)
    return context, after, limit


async def _rules(request: Request) -> Response:
    context, after, limit = _page(request, request.query_params)
    found = await context.alerts.reader.alert_rules(after or 0, limit)
    answers = [_answer(number, stored, receiver) for number, stored, receiver in found]
    return JSONAnswer(RulesAnswer(answers, answers[-1].number if len(answers) == limit else None))


async def _rule(request: Request) -> Response:
    context = context_of(request)
    context.clients.attribute_to(request.scope)
    context.clients.charge(1)
    found = await context.alerts.reader.alert_rule(request.path_params["rule"])
    if found is None:
        raise _REFUSALS["unknown_rule"]
    return JSONAnswer(_answer(*found))


async def _events(request: Request) -> Response:
    context, after, limit = _page(request, request.query_params)
    reader = context.alerts.reader
    found = await (reader.newest_alert_events(limit) if after is None else reader.alert_events(after, limit))
    events = [event_answer(each) for each in found]
    return JSONAnswer(EventsAnswer(events, events[-1].number if events else None))


def _answer(number: int | None, stored: StoredRule, receiver: str) -> RuleAnswer:
    at, done = stored.state
    rule = without_webhook(stored.rule)
    return RuleAnswer(number, stored.id, stored.origin, rule, receiver, done, None if at is None else rfc3339(at))


# Changes


def _authorize(request: Request, times: RequestMetrics) -> None:
    detail = "Changing alert rules needs the configured bearer token."
    authorize(request, times, "alert rule not changed", detail)


async def _rule_of(request: Request) -> AlertRule:
    """Return the rule of a body, with the configured spelling of its names."""
    context = context_of(request)
    try:
        return known_names(decode_rule(await request.body()), context.exchanges, context.symbols)
    except UnknownName as error:
        if error.what == "symbol":
            raise UnknownSymbol("No configured symbol has this name.") from None
        raise UnknownExchange("No configured exchange has this name.") from None
    except InvalidRule as error:
        raise InvalidAlertRule(f"The body is not a rule: {error}.") from None


async def _changed(request: Request, change: RuleChange) -> str:
    """Have a rule changed, and return its id."""
    context = context_of(request)
    context.clients.attribute_to(request.scope)
    context.clients.charge(1)
    try:
        reply = await context.alerts.change(change)
    except Unavailable:
        raise ServiceUnavailable("Rules cannot be changed now: no ingest process answers.") from None
    if reply.code:
        raise _REFUSALS.get(reply.code, _REFUSALS["unavailable"])
    logger.info("alert rule changed by {}: operation={} rule={}", client_of(request), change.operation, reply.id)
    return reply.id


def _made(id: str, rule: AlertRule) -> RuleAnswer:
    return _answer(None, StoredRule(id, "api", rule), receiver_of(rule))
