"""The figures: measured values, what they are compared with, and their targets."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table.

    `measured` has one value per round. `limit`, if given, has the values of something measured in
    the same rounds, which `against` names. `must` and `stretch` are targets: of the ratio if there
    is a limit, otherwise of the measured value.

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

    def reaches(self, target: float | None) -> bool | None:
        """Whether the figure reaches the target. None without a target."""
        if target is None:
            return None
        value = self.median if self.ratio is None else self.ratio
        return value <= target if self.at_most else value >= target

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "median": self.median,
            "limit_median": self.limit_median,
            "ratio": self.ratio,
            "met": self.reaches(self.must),
            "stretch_met": self.reaches(self.stretch),
        }


def table(figures: Sequence[Figure]) -> str:
    """A table with one line per figure."""
    head = (
        "part",
        "what",
        "measured",
        "limit or peer",
        "ratio",
        "must",
        "stretch",
        "",
        "note",
    )
    return columns([head, *(_row(figure) for figure in figures)])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(figure: Figure) -> tuple[str, ...]:
    limit = ""
    if figure.limit_median is not None:
        limit = f"{number(figure.limit_median)} {figure.against}"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    sign = "≤" if figure.at_most else "≥"
    targets = ["" if t is None else f"{sign} {t:g}" for t in (figure.must, figure.stretch)]
    verdict = {None: "", True: "met", False: "NOT MET"}[figure.reaches(figure.must)]
    if figure.reaches(figure.stretch):
        verdict = "stretch met"
    return (
        figure.part,
        figure.name,
        f"{number(figure.median)} {figure.unit}",
        limit,
        ratio,
        *targets,
        verdict,
        figure.note,
    )


def number(value: float) -> str:
    """The value with at least three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
