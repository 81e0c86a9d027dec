"""`marketflow check`: looks at everything the settings name, and says what it found and what to do about it.

It looks with what MarketFlow itself would use (connections, feeds, the decoder's rules), so that it finds what
MarketFlow would find, and it changes nothing: no key, row, table, folder or server is made.
"""

from marketflow.cli.check.findings import Finding, State
from marketflow.cli.check.run_checks import look_at_everything

__all__ = ["Finding", "State", "look_at_everything"]
