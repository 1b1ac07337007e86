"""`make faults-quick`: the part of the fault runs that the suite makes, with a fixed seed.

`make faults` makes all of them, and checks the checker; see `matrix` and `mutants`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.environment import Environment
from faults.matrix import FAULTS, Fault
from faults.runs import run

SEED = 1
AROUND_SECONDS = 0.2


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    with (
        tempfile.TemporaryDirectory(prefix="chat-ticket-faults-") as directory,
        Environment(Path(directory)) as environment,
    ):
        yield environment


@pytest.mark.parametrize(
    "fault", [each for each in FAULTS if each.quick_amount], ids=lambda fault: fault.name
)
def test_nothing_is_lost(environment: Environment, fault: Fault) -> None:
    """Whatever breaks: every acknowledged write is there once, and every follower knows."""
    result = run(environment, fault, seed=SEED, amount=fault.quick_amount, around=AROUND_SECONDS)
    assert result.valid, f"{result.acknowledged} writes before the fault: too few"
    assert result.violations == []
