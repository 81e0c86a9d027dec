"""`python -m marketflow` is the same program as `marketflow`."""

import sys

from marketflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
