"""Attacks the command line with hostile inputs, damaged files, kills and hostile programs. See README.md.

Run it from the root of the repository with `python -m tests.attack`.
"""

import sys
from pathlib import Path

_TESTS = str(Path(__file__).parents[1])
if _TESTS not in sys.path:  # pytest adds it; `python -m tests.attack` does not
    sys.path.append(_TESTS)
