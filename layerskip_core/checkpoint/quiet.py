"""Keeps what transformers and peft print off stderr."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, log lines or warnings, in a block or in a decorated function."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def no_gguf_bar() -> Iterator[None]:
    """No progress bar over the tensors of a GGUF file, which `disable_progress_bar` does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
