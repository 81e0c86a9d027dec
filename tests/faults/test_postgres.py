"""PostgreSQL goes away in every way there is; no row is lost or doubled, and the rest goes on."""

from collections.abc import Callable

from tests.application import ScriptedExchange, Traffic
from tests.faults.conftest import WINDOW_MS, WINDOW_SECONDS, StartApplication, through
from tests.oracle import Rows, assert_rows_equal, differences
from tests.proxy import Proxy
from tests.servers import wait_until


def test_nothing_is_lost_or_doubled_when_the_answer_to_a_commit_is_cut(
    start: StartApplication,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    postgres_proxy: Proxy,
    rows: Callable[[], Rows],
) -> None:
    application = start(through(servers, postgres=postgres_proxy))
    with Traffic(exchanges) as traffic:
        for _ in range(3):
            postgres_proxy.cut_after(b"COMMIT")
            assert postgres_proxy.was_cut.wait(WINDOW_SECONDS + 10)
    wait_until(lambda: not differences(rows(), traffic.sent, WINDOW_MS), message="rows are missing")
    assert application.stop()[0] == 0
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
