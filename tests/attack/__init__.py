"""A campaign of hostile inputs, damaged files, kills and programs against the command line; see README.md.

Run it from the root of the repository with `python -m tests.attack`.
"""

import sys
from pathlib import Path

_TESTS = str(Path(__file__).parents[1])
if _TESTS not in sys.path:  # pytest has put it there; `python -m tests.attack` has not
    sys.path.append(_TESTS)
