"""Make better int4 weights for a model."""

import shlex
import time
from typing import Annotated

from layerskip_core.config.model import CalibrationConfig
from layerskip_core.config.options import Flag, Threads

from ..console import narrate, stage_bars
from ..loading import FreeThreads
from ..options import command


@command
def calibrate(
    config: CalibrationConfig,
    threads: Annotated[
        Threads, Flag("CPU threads; 0: as many as other processes leave free.", panel="Machine")
    ] = 0,
    clear: Annotated[
        bool,
        Flag("Only clear the cache: packed models, and what read-only folders could not hold."),
    ] = False,
) -> None:
    """Calibrate int4 weights on text that the model writes. --quantize int4 and drafts use them
    from then on.

    Example: layerskip calibrate --model my-model
    """
    free_threads = FreeThreads(threads)
    from layerskip_core.calibration import calibrate, output_folder
    from layerskip_core.checkpoint.sidecars import cache_folder, clear_cache
    from layerskip_core.files import hold

    started = time.monotonic()
    with (
        hold(cache_folder() if clear else output_folder(config), "layerskip calibrate"),
        stage_bars() as show,
    ):
        if clear:
            return narrate(f"removed {clear_cache()} files from {cache_folder()}")

        def report(stage: str, total: int, done: int) -> None:
            show(stage, done, total, "")
            free_threads.look()

        free_threads.start()
        path = calibrate(config, report)
    narrate(f"saved int4 weights in {path} after {time.monotonic() - started:.0f} s")
    narrate(f"next: layerskip generate --model {shlex.quote(config.model)} --quantize int4")
