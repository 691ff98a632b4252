"""The folder of `output`: created, tested for space and locked before a long run; its files are replaced whole."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LayerSkipError
from ..files import hold, require_writable, write_file
from .outputs import JOURNAL, OUTPUTS
from .report.documents import REPORT_FILES

_PROBE_BYTES = 1 << 20  # more than any report takes


@contextmanager
def output_folder(folder: str | None, command: str) -> Iterator[Path | None]:
    """The prepared folder, locked by `command`; None if `folder` is None. Raises as `prepare_output` and `hold` do."""
    if folder is None:
        yield None
        return
    path = prepare_output(folder)
    with hold(path, command):
        yield path


def prepare_output(folder: str) -> Path:
    """Creates the folder and checks that a report can be written to it. Raises LayerSkipError."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise LayerSkipError(f"`output` {folder} must be a writable folder, got: {error.strerror}") from error
    for name in (*REPORT_FILES, JOURNAL, OUTPUTS):
        require_writable(path / name, LayerSkipError)
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes each file whole. Raises LayerSkipError when a file cannot be written; it then keeps its old content."""
    for name, content in files.items():
        write_file(folder / name, content, LayerSkipError)
