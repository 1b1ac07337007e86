"""The figures: measured values, what they are compared with, and their targets."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far the machine's speed varies: the interquartile range of something that never changes,
    in its median.

    It is about two standard errors of the median of three rounds.
    """

    rate: float  # of calls
    cpu: float  # of the CPU time of a call

    @classmethod
    def of(cls, *, rates: Sequence[float], cpu: Sequence[float]) -> Self:
        return cls(rate=_spread(rates), cpu=_spread(cpu))


def _spread(values: Sequence[float]) -> float:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / median


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A line of the table, of one run.

    `measured` has one value per round. `limit`, if given, has the values of something measured in
    the same rounds, which `against` names. `must` and `stretch` are targets: of the ratio if there
    is a limit, otherwise of the measured value. `at_most` says that less is better.

    `noise_of` says which noise of the machine it has: none if it counts things. The noise is
    relative to the target, or to `noise_scale`.

    `note` is printed at the end of the line. `details` are copied to the JSON. If they have a
    mapping `by_size`, from the size of the data (as text) to the value there, it is drawn as a
    curve.
    """

    part: str
    name: str
    unit: str
    measured: Sequence[float]
    limit: Sequence[float] = ()
    against: str = ""
    must: float | None = None
    stretch: float | None = None
    at_most: bool = False
    noise_of: Literal["rate", "cpu"] | None = "rate"
    noise_scale: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.measured or (self.limit and len(self.limit) != len(self.measured)):
            raise ValueError(f"{self.part}: {self.name}: rounds are missing")

    @property
    def median(self) -> float:
        return statistics.median(self.measured)

    @property
    def limit_median(self) -> float | None:
        return statistics.median(self.limit) if self.limit else None

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios. Other load on the machine affects both values alike."""
        if not self.limit:
            return None
        pairs = zip(self.measured, self.limit, strict=True)
        return statistics.median(value / limit for value, limit in pairs)

    @property
    def value(self) -> float:
        """What the targets are of."""
        return self.median if self.ratio is None else self.ratio

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names it among the figures of a run."""
        return self.part, self.name, self.unit, self.against

    def is_worse_than(self, other: Self) -> bool:
        return self.value > other.value if self.at_most else self.value < other.value

    def verdict(self, noise: Noise) -> str:
        """Which target it reaches. None is reached that the noise could have missed."""
        if self.must is None:
            return "stretch met" if self._is_met(self.stretch, noise) else ""
        if self._is_met(self.stretch, noise):
            return "stretch met"
        if self._is_met(self.must, noise):
            return "met"
        return "within noise" if self._reaches(self.must) else "NOT MET"

    def _is_met(self, target: float | None, noise: Noise) -> bool:
        if target is None or not self._reaches(target):
            return False
        if self.noise_of is None:
            return True
        margin = abs(self.value - target) / (self.noise_scale or target)
        return margin >= (noise.cpu if self.noise_of == "cpu" else noise.rate)

    def _reaches(self, target: float) -> bool:
        return self.value <= target if self.at_most else self.value >= target


@dataclass(frozen=True, kw_only=True)
class Result:
    """A figure of all runs: that of the worst run counts."""

    runs: Sequence[Figure]  # not empty

    @property
    def worst(self) -> Figure:
        worst = self.runs[0]
        for run in self.runs:
            worst = run if run.is_worse_than(worst) else worst
        return worst

    def as_json(self, noise: Noise) -> dict[str, Any]:
        worst = self.worst
        verdict = worst.verdict(noise)
        runs = [
            {
                "measured": run.measured,
                "limit": run.limit,
                "median": run.median,
                "limit_median": run.limit_median,
                "ratio": run.ratio,
            }
            for run in self.runs
        ]
        return {
            **dataclasses.asdict(worst),
            "median": worst.median,
            "limit_median": worst.limit_median,
            "ratio": worst.ratio,
            "verdict": verdict,
            "met": None if worst.must is None else verdict in ("met", "stretch met"),
            "runs": runs,
        }


def results(runs: Iterable[Sequence[Figure]]) -> list[Result]:
    """The figures of several runs, in the order of the first that has them."""
    by_key: dict[tuple[str, str, str, str], list[Figure]] = {}
    for run in runs:
        for figure in run:
            by_key.setdefault(figure.key, []).append(figure)
    return [Result(runs=figures) for figures in by_key.values()]


def table(results: Sequence[Result], noise: Noise) -> str:
    """A table with one line per figure."""
    head = (
        "part",
        "what",
        "measured",
        "limit or peer",
        "ratio",
        "other run",
        "must",
        "stretch",
        "",
        "note",
    )
    return columns([head, *(_row(result, noise) for result in results)])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(result: Result, noise: Noise) -> tuple[str, ...]:
    figure = result.worst
    limit = ""
    if figure.limit_median is not None:
        limit = f"{number(figure.limit_median)} {figure.against}"
    sign = "≤" if figure.at_most else "≥"
    targets = ["" if t is None else f"{sign} {t:g}" for t in (figure.must, figure.stretch)]
    others = (run for run in result.runs if run is not figure)
    return (
        figure.part,
        figure.name,
        f"{number(figure.median)} {figure.unit}",
        limit,
        "" if figure.ratio is None else f"{figure.ratio:.2f}",
        ", ".join(number(run.value) if run.ratio is None else f"{run.ratio:.2f}" for run in others),
        *targets,
        figure.verdict(noise),
        figure.note,
    )


def number(value: float) -> str:
    """The value with at least three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
