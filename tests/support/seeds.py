"""Which seeds a test with made-up inputs takes: as many as it has time for, more with SEEDS=, one with SEED=."""

import os


def seeds(usually: int) -> range:
    """The numbers from 0 on, a fixed count of them unless the environment says otherwise."""
    if one := os.environ.get("SEED"):
        return range(int(one), int(one) + 1)
    return range(int(os.environ.get("SEEDS", usually)))
