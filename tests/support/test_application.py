"""Processes of tests end with them."""

from pathlib import Path

import pytest

from tests.support.application import Application


class NeverReady(Application):
    def ready(self) -> bool:
        assert "because" not in self.log, "not ready"
        return False


def test_application_that_does_not_become_ready_is_ended(server_folder: Path) -> None:
    application = NeverReady(server_folder, program=("-uc", "import time; print('because'); time.sleep(600)"))
    with pytest.raises(AssertionError, match=r"not ready\n.*because"), application:
        pass
    assert application.process.poll() is not None
