"""Reading what /metrics says."""

from prometheus_client.parser import text_string_to_metric_families

from marketflow.counters import Delays, ExchangeCounters, IngestCounters
from marketflow.model import HoleState

INGEST_COUNTERS = IngestCounters(
    exchanges={
        "exchange1": ExchangeCounters(
            700,
            {"malformed": 3, "bad_price": 0},
            2,
            5,
            1_763_690_430_250,
            23,
            {HoleState.OPEN: 24},
            Delays((0.1, 1.0), (25, 26, 27), 28.5),
            {"verified": 29, "different": 30},
        ),
        "Exchange2": ExchangeCounters(0, {"malformed": 0, "bad_price": 0}, 0, 1, None),
    },
    tick_to_cache=Delays((0.001, 0.01), (90, 9, 1), 0.75),
    ticks_too_late=11,
    cache_errors=12,
    archive_errors=13,
    rows_written=14,
    rows_refused=15,
    rows_pending=16,
    rows_dropped=17,
    given_up=18,
    stalls={"archive": 19},
    shards_owned={"exchange1/1of2": True},
    shards_standby={"exchange1/1of2": False},
    shard_takeovers=31,
)
"""Made up, no two alike."""


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """Values by name and labels."""

    def of(self, name: str, **labels: str) -> float | None:
        """One of them, None where there is none; the prefix is added to the name."""
        return self.get((f"marketflow_{name}", frozenset(labels.items())))

    def requests(self) -> dict[tuple[str, str, str], float]:
        """How many there were, by route, method and status."""
        return {
            (of["route"], of["method"], of["status"]): value
            for (name, labels), value in self.items()
            if name == "marketflow_http_request_seconds_count" and (of := dict(labels))
        }


def samples_of(text: str) -> Samples:
    """Those of a whole answer."""
    return Samples(
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )
