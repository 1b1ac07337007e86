"""Draw build/bench/figures.json: `python picture.py FIGURES.json PICTURE.png`.

Runs in .venv-bench, which has matplotlib but not this project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLUMNS = 3
COLOURS = {None: "tab:grey", True: "tab:green", False: "tab:red"}


def main(source: Path, target: Path) -> None:
    figures = json.loads(source.read_text())["figures"]
    ratios = [figure for figure in figures if figure["ratio"] is not None]
    curves = [figure for figure in figures if "by_size" in figure["details"]]
    rows = -(-len(curves) // COLUMNS)
    height = 1 + 0.3 * len(ratios)
    plot = pyplot.figure(figsize=(15, height + 3 * rows), layout="constrained")
    grid = plot.add_gridspec(1 + rows, COLUMNS, height_ratios=[height] + [3] * rows)
    if ratios:
        bars(plot.add_subplot(grid[0, :]), ratios)
    for number, figure in enumerate(curves):
        curve(plot.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS]), figure)
    plot.savefig(target, dpi=110)


def bars(axes: Any, figures: list[dict[str, Any]]) -> None:
    """A bar with the ratio of each figure to its limit, and lines for the targets."""
    positions = range(len(figures))
    ratios = [figure["ratio"] for figure in figures]
    axes.barh(positions, ratios, color=[COLOURS[figure["met"]] for figure in figures])
    axes.set_yticks(positions, [f"{figure['part']}: {figure['name']}" for figure in figures])
    for position, figure in enumerate(figures):
        text = f" {figure['ratio']:.2f} ({figure['against']})"
        axes.text(figure["ratio"], position, text, va="center")
        for target, style in ((figure["must"], "-"), (figure["stretch"], ":")):
            if target is not None:
                axes.plot([target, target], [position - 0.4, position + 0.4], style, color="black")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(ratios) / 2, 5 * max(ratios))
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xlabel("ratio to the limit or peer in brackets; black: must, dotted: stretch")


def curve(axes: Any, figure: dict[str, Any]) -> None:
    by_size = figure["details"]["by_size"]
    axes.plot([float(size) for size in by_size], list(by_size.values()), marker="o")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.2 * max(by_size.values()))
    axes.set_title(f"{figure['part']}: {figure['name']}")
    axes.set_xlabel("size of the data")
    axes.set_ylabel(figure["unit"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
