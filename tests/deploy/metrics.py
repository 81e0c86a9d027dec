"""The metrics that /metrics shows, by which rules and dashboards are held to what there is."""

import asyncio
from collections.abc import Iterator
from functools import cache

from tests.api.world import World, client_of
from tests.support.exposition import INGEST_COUNTERS, samples_of

SUFFIXES = ("_bucket", "_sum", "_count")


@cache
def known_metrics() -> dict[str, set[str]]:
    """The names of all samples, and the labels of each."""
    known: dict[str, set[str]] = {}
    for name, labels in samples_of(asyncio.run(_second_scrape())):
        known.setdefault(name, set()).update(label for label, _ in labels)
    return known


async def _second_scrape() -> str:
    """Which tells of a request, the first one."""
    async with client_of(World(counters=INGEST_COUNTERS).context()) as client:
        await client.get("/metrics")
        return (await client.get("/metrics")).text


def families() -> Iterator[str]:
    """The names of all that is MarketFlow's own, a histogram being one."""
    own = [name for name in known_metrics() if name.startswith("marketflow_")]
    histograms = {name.removesuffix("_bucket") for name in own if name.endswith("_bucket")}
    yield from histograms
    yield from (
        name for name in own if not any(name == f"{each}{suffix}" for each in histograms for suffix in SUFFIXES)
    )
