"""The metrics that /metrics shows, by which rules and dashboards are held to what there is."""

from collections.abc import Iterator

SUFFIXES = ("_bucket", "_sum", "_count")

# To be read off the application once it has /metrics.
_METRICS: dict[str, set[str]] = {
    "marketflow_ticks_total": {"exchange"},
    "marketflow_ticks_rejected_total": {"exchange", "reason"},
    "marketflow_timestamps_replaced_total": {"exchange"},
    "marketflow_ticks_too_late_total": set(),
    "marketflow_feed_connected": {"exchange"},
    "marketflow_feed_reconnects_total": {"exchange"},
    "marketflow_feed_last_tick_timestamp_seconds": {"exchange"},
    "marketflow_tick_to_cache_seconds_bucket": {"le"},
    "marketflow_tick_to_cache_seconds_sum": set(),
    "marketflow_tick_to_cache_seconds_count": set(),
    "marketflow_cache_errors_total": set(),
    "marketflow_aggregates_written_total": set(),
    "marketflow_aggregates_pending": set(),
    "marketflow_aggregates_refused_total": set(),
    "marketflow_aggregates_dropped_total": set(),
    "marketflow_archive_errors_total": set(),
    "marketflow_given_up_total": set(),
    "marketflow_http_request_seconds_bucket": {"route", "method", "status", "le"},
    "marketflow_http_request_seconds_sum": {"route", "method", "status"},
    "marketflow_http_request_seconds_count": {"route", "method", "status"},
    "marketflow_store_up": {"store"},
    "marketflow_mode": {"mode"},
    "marketflow_feeds_up": set(),
    "marketflow_build_info": {"version"},
    "process_cpu_seconds_total": set(),
    "process_max_fds": set(),
    "process_open_fds": set(),
    "process_resident_memory_bytes": set(),
    "process_start_time_seconds": set(),
    "process_virtual_memory_bytes": set(),
}


def known_metrics() -> dict[str, set[str]]:
    """The names of all samples, and the labels of each."""
    return _METRICS


def families() -> Iterator[str]:
    """The names of all that is MarketFlow's own, a histogram being one."""
    own = [name for name in known_metrics() if name.startswith("marketflow_")]
    histograms = {name.removesuffix("_bucket") for name in own if name.endswith("_bucket")}
    yield from histograms
    yield from (
        name for name in own if not any(name == f"{each}{suffix}" for each in histograms for suffix in SUFFIXES)
    )
