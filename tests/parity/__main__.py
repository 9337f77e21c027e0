"""`python -m tests.parity DIR [DIR ...]`: run every vector of golden folders.

A folder holds a `manifest.json` in one of the three formats under `fixtures/` (RL algorithms,
EVAC, OpenVLA-OFT). One line per vector; exit status 1 if any vector falls short or is not covered.
"""

import sys
from pathlib import Path

from tests.parity import report

if __name__ == "__main__":
    sys.exit(report.main([Path(arg) for arg in sys.argv[1:]]))
