"""`marketflow check`: health checks of everything that the settings name, with advice for each fault.

The checks use the same connections, feeds and decoder rules as the server, so they see what it would see. They change
nothing: no key, row, table, folder or server is made.
"""

from marketflow.cli.check.check_result import CheckResult, CheckState
from marketflow.cli.check.runner import run_checks

__all__ = ["CheckResult", "CheckState", "run_checks"]
