"""Reading what /metrics says."""

from prometheus_client.parser import text_string_to_metric_families


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
