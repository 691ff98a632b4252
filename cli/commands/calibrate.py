"""Make better int4 weights for a model."""

import shlex
import time
from typing import Annotated

from layerskip_core.config.model import CalibrationConfig
from layerskip_core.config.options import Flag, Threads

from ..console import narrate, stage_bars
from ..loading import use_threads
from ..options import command


@command
def calibrate(
    config: CalibrationConfig, threads: Annotated[Threads, Flag("CPU threads; 0: torch's choice.", panel="Machine")] = 0
) -> None:
    """Calibrate int4 weights on text that the model writes. --quantize int4 and --draft-weights int4 use them from then on.

    Example: layerskip calibrate --model my-model
    """
    use_threads(threads)
    from layerskip_core.calibration import calibrate, output_folder
    from layerskip_core.files import hold

    started = time.monotonic()
    with hold(output_folder(config), "layerskip calibrate"), stage_bars() as show:

        def report(stage: str, total: int, done: int, divergence: float | None = None) -> None:
            show(stage, done, total, "" if divergence is None else f"divergence {divergence:.3f}")

        folder = calibrate(config, report)
    narrate(f"saved int4 weights in {folder} after {time.monotonic() - started:.0f} s")
    narrate(f"next: layerskip generate --model {shlex.quote(folder)} --quantize int4")
