"""Draw build/bench/figures.json: `python picture.py FIGURES.json PICTURE.png`.

Runs in an environment of its own, which has matplotlib and nothing of ours.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {None: "tab:grey", True: "tab:green", False: "tab:red"}


def main(source: Path, target: Path) -> None:
    figures = json.loads(source.read_text())["figures"]
    ratios = [figure for figure in figures if figure["ratio"] is not None]
    curves = [figure for figure in figures if "by_size" in figure["details"]]
    rows = 1 + (len(curves) + 1) // 2
    height = 1 + 0.32 * len(ratios)
    plot = pyplot.figure(figsize=(13, height + 3 * (rows - 1)), layout="constrained")
    grid = plot.add_gridspec(rows, 2, height_ratios=[height] + [3] * (rows - 1))
    bars(plot.add_subplot(grid[0, :]), ratios)
    for number, figure in enumerate(curves):
        curve(plot.add_subplot(grid[1 + number // 2, number % 2]), figure)
    plot.savefig(target, dpi=110)


def bars(axes: Any, figures: list[dict[str, Any]]) -> None:
    """The ratio of each figure to its limit, and with a line what it must be."""
    names = [f"{figure['part']}: {figure['name']}" for figure in figures]
    ratios = [figure["ratio"] for figure in figures]
    axes.barh(names, ratios, color=[COLOURS[figure["met"]] for figure in figures])
    for place, figure in enumerate(figures):
        axes.text(
            figure["ratio"], place, f" {figure['ratio']:.2f} of {figure['against']}", va="center"
        )
        for target, style in ((figure["must"], "-"), (figure["stretch"], ":")):
            if target is not None:
                axes.plot([target, target], [place - 0.4, place + 0.4], style, color="black")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ratio to the limit or peer; lines: must, and dotted: stretch")


def curve(axes: Any, figure: dict[str, Any]) -> None:
    by_size = figure["details"]["by_size"]
    axes.plot([float(size) for size in by_size], list(by_size.values()), marker="o")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{figure['part']}: {figure['name']}")
    axes.set_xlabel("size of the data")
    axes.set_ylabel(figure["unit"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
