"""The noise of the machine: how the empty call of a stock gRPC server varies during a run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import EMPTY_PATH, load, yardsticks
from benchmarks.figures import Noise
from benchmarks.load import Load, Outcome

CALLERS = 16
SAMPLES = 3  # each time
SAMPLE_SECONDS = 0.5


@contextlib.contextmanager
def sampler(directory: Path) -> Iterator[Callable[[], list[Outcome]]]:
    """A function that takes samples. Its server idles in between."""
    with yardsticks.stock(directory / "noise.log") as server, load.client() as call:
        sample = Load(
            address=server.address,
            path=EMPTY_PATH,
            requests=[b""],
            callers=CALLERS,
            seconds=SAMPLE_SECONDS,
            watched={"server": server.pid},
        )
        call(sample)  # to warm up
        yield lambda: [call(sample) for _ in range(SAMPLES)]


def noise(samples: Sequence[Outcome]) -> Noise:
    return Noise.of(
        rates=[sample.calls_per_second for sample in samples],
        cpu=[sample.cpu_us["server"] for sample in samples],
    )
