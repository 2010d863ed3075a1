"""`python -m maskwright` is the command `maskwright`."""

from __future__ import annotations

import sys

from maskwright.cli import main

if __name__ == "__main__":
    sys.exit(main())
