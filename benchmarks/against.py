"""`make bench AGAINST=<commit>`: measures this checkout and another commit in turns, in one run.

Both versions have their own servers and databases, in the same PostgreSQL. Each makes a step of a
part, such as half a second of one call, then the other makes the same step. So what else happens on
the machine affects both alike, and the ratio of a round is that of two adjacent steps.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import checkout
from benchmarks.checkout import Checkout
from benchmarks.figures import Figure, columns, number
from benchmarks.service import Bench
from benchmarks.turns import run_in_turns

# Of the parts, by name: those whose steps start no server of this checkout in another way, and
# read or write nothing but through the API.
PARTS = ("calls", "batch", "streams", "watch", "workers", "peers", "neighbour")

MIN_ROUNDS = 3
SHORT = 10  # digits of a commit


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure of this checkout, and the same figure of the other commit."""

    this: Figure
    that: Figure

    @property
    def ratios(self) -> list[float]:
        """This checkout's values in those of the other commit, by round."""
        pairs = zip(self.this.measured, self.that.measured, strict=True)
        return [this / that for this, that in pairs if that]

    @property
    def verdict(self) -> str:
        """Which one is better, if all rounds agree and are not so few that it means nothing."""
        if len(self.ratios) < MIN_ROUNDS:
            return ""
        if min(self.ratios) > 1:
            return "worse" if self.this.at_most else "better"
        if max(self.ratios) < 1:
            return "better" if self.this.at_most else "worse"
        return ""


def measure(
    part: Callable[[Bench], list[Figure]], bench: Bench, other: Checkout
) -> list[Comparison]:
    """Measure a part with both versions."""

    def with_version(version: Checkout) -> Callable[[Callable[[], None]], list[Figure]]:
        def work(pause: Callable[[], None]) -> list[Figure]:
            checkout.CURRENT.set(version)
            directory = bench.directory / ("this" if version is checkout.THIS else "that")
            directory.mkdir()

            def progress(text: str) -> None:
                pause()
                bench.progress(text)

            return part(
                dataclasses.replace(
                    bench, directory=directory, progress=progress, with_limits=False
                )
            )

        return work

    this, that = run_in_turns([with_version(checkout.THIS), with_version(other)])
    found = {(figure.name, figure.unit): figure for figure in that}
    # A figure appears once for each of its limits, which do not matter here.
    once = {(figure.name, figure.unit): figure for figure in this}
    return [
        Comparison(this=figure, that=found[key]) for key, figure in once.items() if key in found
    ]


def table(comparisons: Sequence[Comparison], commit: str) -> str:
    head = ("part", "what", commit[:SHORT], "this", "ratio", "of the rounds", "")
    return columns([head, *(_row(comparison) for comparison in comparisons)])


def _row(comparison: Comparison) -> tuple[str, ...]:
    this, that, ratios = comparison.this, comparison.that, comparison.ratios
    return (
        this.part,
        this.name,
        number(that.median),
        f"{number(this.median)} {this.unit}",
        f"{statistics.median(ratios):.3f}" if ratios else "",
        f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "",
        comparison.verdict,
    )
