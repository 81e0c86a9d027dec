"""Alerts: rules of what is watched, and events that say what has happened.

A rule is about the mode that runs; its events say which one that was. Durations are texts such as `30s` or `24h`.
"""

import hashlib
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from marketflow.health import Time
from marketflow.model import SLICE_MS, Mode
from marketflow.time_parsing import duration_ms

AlertKind = Literal["price", "change", "gap", "stale", "hole"]
Direction = Literal["up", "down", "either"]
Period = Literal["10s", "30s", "1m", "3m", "5m", "15m", "30m", "1h", "4h", "12h", "24h"]
Origin = Literal["settings", "api"]

MOST_RULES = 20_000
"""Rules at most, configured ones and those of the API together."""

MASK: Final = "***"

_PORT = "6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3}"
_LABEL = "[A-Za-z0-9_-]{1,63}"
_URL = rf"https?://{_LABEL}(\.{_LABEL})*\.?(:({_PORT}))?(/[!-~]*)?"  # without credentials

_Name = Annotated[str, Meta(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$", description="Shown with its events.")]
_Cooldown = Annotated[
    str,
    Meta(
        pattern="^[0-9]{1,5}[smhd]$",
        description="For how long after an event there is no other one of this rule.",
        examples=["1m", "0s", "1h"],
    ),
]
_Url = Annotated[
    str,
    Meta(
        max_length=2000,
        pattern=f"^{_URL}$",
        description="Where events are posted to: a host name or an IPv4 address.",
        examples=["https://example.com/hooks/prices"],
    ),
]
_Secret = Annotated[
    str,
    Meta(
        min_length=16,
        max_length=200,
        pattern="^[!-~]*$",
        description="Signs what is posted (HMAC-SHA256): at least 16 printable ASCII characters.",
        examples=["a-secret-of-16-characters"],
    ),
]
_Symbol = Annotated[str, Meta(max_length=32, examples=["BTCUSDT"], description="A configured symbol.")]
_Exchange = Annotated[str, Meta(max_length=32, description="A configured exchange; null is any.")]
_Source = Annotated[
    str,
    Meta(
        max_length=32,
        description="A configured exchange; `reference` is the median over the exchanges; null is the newest price of "
        "all exchanges.",
    ),
]
_Direction = Annotated[Direction, Meta(description="Which way it must be crossed.")]


class Webhook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the events of a rule are posted, and what signs them. Its representation shows neither."""

    url: _Url
    secret: _Secret

    @property
    def receiver(self) -> str:
        """Return the scheme, host and port: what may be shown of it."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.partition('/')[0].lower()}"

    def __repr__(self) -> str:
        return f"Webhook({MASK})"


class RuleOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What rules of all kinds have."""

    name: _Name = ""
    once: Annotated[bool, Meta(description="Whether its first event ends it, also over restarts.")] = False
    cooldown: _Cooldown = "1m"
    webhook: Annotated[Webhook | None, Meta(description="Where its events are posted, too.")] = None

    @property
    def cooldown_ms(self) -> int:
        """Return the cooldown in ms."""
        return duration_ms(self.cooldown)


class PriceRule(RuleOptions, frozen=True, kw_only=True, tag_field="kind", tag="price"):
    """A price reaches a level from below (`up`), from above (`down`), or either."""

    symbol: _Symbol
    exchange: _Source | None = None
    level: Annotated[float, Meta(gt=0, le=1e12, examples=[70_000])]
    direction: _Direction = "either"


class ChangeRule(RuleOptions, frozen=True, kw_only=True, tag_field="kind", tag="change"):
    """A price has risen (`up`) or fallen (`down`) by so many percent within a period."""

    symbol: _Symbol
    exchange: _Source | None = None
    percent: Annotated[float, Meta(gt=0, le=1e6, examples=[2.5])]
    period: Annotated[Period, Meta(description="The price now is compared with that of so long ago.")]
    direction: _Direction = "either"

    @property
    def period_ms(self) -> int:
        """Return the period in ms."""
        return duration_ms(self.period)


class GapRule(RuleOptions, frozen=True, kw_only=True, tag_field="kind", tag="gap"):
    """The highest price of the exchanges is so many basis points above the lowest one."""

    symbol: _Symbol
    basis_points: Annotated[float, Meta(gt=0, le=1e6, examples=[20])]


class StaleRule(RuleOptions, frozen=True, kw_only=True, tag_field="kind", tag="stale"):
    """A feed gives no good tick for `flow.stale_after_seconds`."""

    exchange: _Exchange | None = None


class HoleRule(RuleOptions, frozen=True, kw_only=True, tag_field="kind", tag="hole"):
    """Trades of a venue are missing: a hole was found."""

    exchange: _Exchange | None = None
    symbol: Annotated[str, Meta(max_length=32, description="A configured symbol; null is any.")] | None = None


AlertRule = PriceRule | ChangeRule | GapRule | StaleRule | HoleRule

KINDS: dict[type[RuleOptions], AlertKind] = {
    PriceRule: "price",
    ChangeRule: "change",
    GapRule: "gap",
    StaleRule: "stale",
    HoleRule: "hole",
}
"""The kinds by the class of their rules."""


def receiver_of(rule: AlertRule) -> str:
    """Return the receiver of a rule's webhook; "" without one."""
    return "" if rule.webhook is None else rule.webhook.receiver


def configured_id(rule: AlertRule) -> str:
    """Return the id of a configured rule: of the same rule the same, so that what it has done is known after a restart.

    Where it is delivered does not matter.
    """
    return f"s{hashlib.sha256(msgspec.json.encode(without_webhook(rule))).hexdigest()[:23]}"


class AlertEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule has found, as streams and webhooks have it. What does not apply is null."""

    id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$", description="The same however often it is delivered.")]
    rule: Annotated[str, Meta(description="Id of the rule.")]
    name: Annotated[str, Meta(description="Name of the rule.")]
    kind: AlertKind
    mode: Mode
    symbol: str | None
    exchange: Annotated[str | None, Meta(description="An exchange, `reference`, or null for all.")]
    direction: Literal["up", "down"] | None
    threshold: Annotated[float | None, Meta(description="What was reached: a price, percent or basis points.")]
    value: Annotated[float | None, Meta(description="By which it was reached, in the same unit.")]
    timestamp: Annotated[Time, Meta(description="Event time, of the first tick known to have reached it.")]
    text: Annotated[str, Meta(description="The event in words.")]


class RaisedAlert(NamedTuple):
    """An event with what its rule says about further ones.

    Args:
        event: the event.
        at: its time (Unix ms).
        cooldown_ms: how long there is no other one of its rule.
        once: whether it ends its rule.
        receiver: the receiver of the rule's webhook, or "".
    """

    event: AlertEvent
    at: int
    cooldown_ms: int
    once: bool
    receiver: str


class RuleState(NamedTuple):
    """What is stored of the events of a rule: the time of the last one (Unix ms), and whether that ended it."""

    last_event_at: int | None = None
    done: bool = False


class StoredRule(NamedTuple):
    """A rule, its id, where it is from, and what it has done."""

    id: str
    origin: Origin
    rule: AlertRule
    state: RuleState = RuleState()
    made_at: int = 0
    """When it was made or changed, as far as this is known of one that was read (Unix ms)."""


def event_id(rule: str, mode: Mode, subject: tuple[str | None, ...], at: int) -> str:
    """Return the id of an event: of the same crossing the same, whichever process finds it, however often.

    Args:
        rule: id of the rule.
        mode: of the ticks.
        subject: what it is about: exchange, symbol, direction or hole.
        at: event time (Unix ms), of which the slice counts.
    """
    parts = (rule, mode.value, *(part or "" for part in subject), str(at - at % SLICE_MS))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def without_webhook(rule: AlertRule) -> AlertRule:
    """Return a rule as anyone may see it."""
    return msgspec.structs.replace(rule, webhook=None)


class DueDelivery(NamedTuple):
    """An event to be posted to the webhook of its rule.

    Args:
        event: id of the event.
        rule: id of the rule.
        body: the event as JSON.
        attempts: how often it was posted before.
        found_at: when the event was stored (Unix ms).
    """

    event: str
    rule: str
    body: str
    attempts: int
    found_at: int
