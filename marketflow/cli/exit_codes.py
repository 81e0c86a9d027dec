"""Exit codes of the command line; 0 is success, or a server that a signal ended."""

FAILED = 1
"""A start that fails, a failed check, or a failed export."""

USAGE = 2
"""A wrong argument or setting."""

INTERRUPTED = 130
"""An interrupted command that ends by itself: 0 would mean that all is well, or all is written."""
