import json
import subprocess
import sys
from pathlib import Path

import pytest

from marketflow.cli import main

pytestmark = pytest.mark.usefixtures("nothing_set")


def test_config_prints_sources_and_masks_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "c.toml"
    path.write_text("http = {host = '::1'}\nredis = {password = 'hush'}")
    monkeypatch.setenv("MARKETFLOW_FLOW__DB_BATCH_SIZE", "7")
    monkeypatch.setenv("MARKETFLOW_POSTGRES__PASSWORD", "hush")
    flags = ["--config", str(path), "--port", "5", "--data-dir", "/data"]
    assert main.main(["config", *flags, "--format", "json"]) == 0
    shown = capsys.readouterr().out
    report = json.loads(shown)
    assert report["http.host"] == {"value": "::1", "source": str(path)}
    assert report["data_dir"] == {"value": "/data", "source": "--data-dir"}
    assert report["http.port"] == {"value": 5, "source": "--port"}
    assert report["flow.db_batch_size"] == {"value": 7, "source": "MARKETFLOW_FLOW__DB_BATCH_SIZE"}
    assert report["redis.password"] == {"value": "***", "source": str(path)}
    assert report["postgres.password"] == {"value": "***", "source": "MARKETFLOW_POSTGRES__PASSWORD"}
    assert report["http.token"] == {"value": "", "source": "default"}
    assert report["generator.seed"] == {"value": None, "source": "default"}
    monkeypatch.setenv("COLUMNS", "250")
    for form in ("table", "toml"):
        assert main.main(["config", *flags, "--format", form]) == 0
        other = capsys.readouterr().out
        assert "hush" not in shown + other
        assert all(key.rpartition(".")[2] in other for key in report)
        assert all(part["source"] in other for part in report.values())


def test_reader_that_closes_the_pipe_does_not_fail_config() -> None:
    line = f"set -o pipefail; {sys.executable} -m marketflow config | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
