"""Draws what conversions cost and gain, from the table of RESULTS.md: python examples/smollm2/front.py (writes front.png)."""

import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    section = text.partition("## Conversion by self-distillation")[2].partition("\n## ")[0]
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, line in enumerate(re.findall(r"^\| (?!what|-)(.*) \|$", section, re.MULTILINE), start=1):
        name, agreement, _, divergence, *_, seconds = (cell.strip(" *") for cell in line.split("|"))
        x, y, minutes = float(divergence), float(agreement.rstrip("%")), float(re.sub(r"[^\d]", "", seconds)) / 60
        axes.scatter(x, y, s=5 * minutes + 15, alpha=0.6, label=textwrap.fill(f"{number} {name} ({minutes:.0f} min)", 110))
        axes.annotate(str(number), (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("what the model pays: divergence from the original at full depth, nats")
    axes.set_ylabel("first drafts that agree, %")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.12))
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "front.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
