"""`python -m marketflow` is the same program as `marketflow`."""

import sys

from marketflow.cli.main import main

if __name__ == "__main__":
    code = main()
    # Python ends a module by SIGINT where a KeyboardInterrupt has passed the code of a string, such as namedtuple's,
    # though it was handled since: unless another string was executed after it.
    exec("")  # noqa: S102 - nothing is executed
    sys.exit(code)
