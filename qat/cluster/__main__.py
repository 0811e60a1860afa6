"""`python -m qat.cluster`: one machine's part of a job; see `node.py`."""

import sys

from qat.cluster.node import main

if __name__ == "__main__":
    sys.exit(main())
