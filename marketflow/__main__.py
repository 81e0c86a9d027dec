"""`python -m marketflow` is the same program as `marketflow`."""

import sys

from marketflow.cli.main import main

if __name__ == "__main__":
    code = main()
    # `python -m` ends by SIGINT if a KeyboardInterrupt has passed code that was made from a string, as namedtuple's is,
    # even if it was handled afterwards. Executing another string resets that.
    exec("")  # noqa: S102 - nothing is executed
    sys.exit(code)
