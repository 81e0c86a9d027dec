"""Hours of the whole pipeline in virtual time with random faults, from seeds; see simulation.py.

More of them, or the one that failed:

    SEEDS=1000 pytest tests/pipeline/test_simulation.py
    SEED=17 pytest tests/pipeline/test_simulation.py
"""

from collections.abc import Iterator

import pytest
from loguru import logger

from tests.pipeline.simulation import Simulation
from tests.support.seeds import seeds


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable the log: faults log warnings."""
    logger.disable("marketflow")
    yield
    logger.enable("marketflow")


@pytest.mark.long
@pytest.mark.parametrize("seed", seeds(4))
def test_random_faults_lose_and_double_no_tick(seed: int) -> None:
    simulation = Simulation(seed)
    try:
        simulation.play()
    except Exception:
        print(*simulation.trace, sep="\n")
        print(f"again: SEED={seed} pytest {__file__}")
        raise
    # The account itself must not let too much pass.
    assert simulation.ticks > 1000
    uncertain = sum(minute.uncertain for minute in simulation.minutes.values())
    assert uncertain <= len(simulation.minutes) / 20


@pytest.mark.long
def test_a_seed_is_the_same_hour_each_time() -> None:
    first, second = Simulation(1, seconds=900), Simulation(1, seconds=900)
    first.play()
    second.play()
    assert first.trace == second.trace
    assert first.archive.rows == second.archive.rows
    assert first.redis.sorted_sets == second.redis.sorted_sets
