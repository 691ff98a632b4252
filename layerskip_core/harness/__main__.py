"""`python -m layerskip_core.harness ...`: the command `lm_eval` with the model type `layerskip`
among its models.
"""

import sys

from ..errors import LayerSkipError
from . import register

if __name__ == "__main__":
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except LayerSkipError as error:
        sys.exit(f"error: {error}")
