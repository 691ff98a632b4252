"""The files of a comparison."""

import json

from .comparison import Comparison
from .tables import compare_table, to_csv


def to_json(comparison: Comparison) -> str:
    return json.dumps(comparison.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def compare_files(comparison: Comparison) -> dict[str, bytes]:
    """The table as Markdown, all numbers as JSON and CSV, and a PNG per figure; by name."""
    from .plots import plots

    texts = {
        "comparison.md": compare_table(comparison).markdown(),
        "comparison.json": to_json(comparison),
        "comparison.csv": to_csv(comparison),
    }
    files = {name: text.encode() for name, text in texts.items()}
    return files | {f"{name}.png": image for name, image in plots(comparison).items()}
