"""What `make bench` says of two runs, and of a machine that is not quiet."""

import pytest

from benchmarks.figures import Figure, Noise, results

QUIET = Noise(rate=0.01, cpu=0.01)


def figure(*measured: float, **options):
    return Figure(**{"part": "calls", "name": "a call", "unit": "µs", **options}, measured=measured)


@pytest.mark.parametrize(("at_most", "worse"), [(True, 12), (False, 10)])
def test_the_run_with_the_worse_median_counts(at_most, worse):
    """Whichever run it was; one bad round does not make a run the worse one."""
    runs = [[figure(12, 11, 13, at_most=at_most)], [figure(10, 99, 10, at_most=at_most)]]
    for order in (runs, runs[::-1]):
        [result] = results(order)
        assert result.worst.median == worse


def test_runs_are_compared_by_the_ratio_to_the_limit():
    """The machine may have been slower, for both, in the run whose ratio is better."""
    slow = figure(30, limit=[20], at_most=True)
    fast = figure(20, limit=[10], at_most=True)
    [result] = results([[slow], [fast]])
    assert result.worst is fast


def test_the_json_has_the_values_of_both_runs():
    """That of the worse run beside them, as the figure's own."""
    [result] = results([[figure(10, at_most=True)], [figure(12, at_most=True)]])
    report = result.as_json(QUIET)
    assert report["median"] == 12
    assert [run["median"] for run in report["runs"]] == [10, 12]


def test_a_figure_of_one_run_remains():
    """Its part may have failed in the other run."""
    first = [figure(10, against="pgbench")]
    second = [figure(11, against="COPY")]
    assert [len(result.runs) for result in results([first, second])] == [1, 1]


@pytest.mark.parametrize(
    ("measured", "options", "noise", "verdict"),
    [
        (90, {"must": 100, "at_most": True}, QUIET, "met"),
        (90, {"must": 100, "at_most": True}, Noise(rate=0.11, cpu=0), "within noise"),
        (90, {"must": 100, "at_most": True, "noise_of": "cpu"}, Noise(rate=0.11, cpu=0), "met"),
        (90, {"must": 100, "at_most": True, "noise_of": "cpu"}, Noise(rate=0, cpu=0.11),
         "within noise"),
        (110, {"must": 100}, Noise(rate=0.11, cpu=0), "within noise"),
        (110, {"must": 100, "at_most": True}, Noise(rate=0.5, cpu=0.5), "NOT MET"),
        (90, {"must": 200, "stretch": 100, "at_most": True}, QUIET, "stretch met"),
        (90, {"must": 200, "stretch": 100, "at_most": True}, Noise(rate=0.2, cpu=0), "met"),
        (28, {"must": 30, "at_most": True, "noise_scale": 200}, QUIET, "met"),
        (29, {"must": 30, "at_most": True, "noise_scale": 200}, QUIET, "within noise"),
        (0, {"must": 0, "at_most": True, "noise_of": None}, QUIET, "met"),
        (90, {"stretch": 100, "at_most": True}, Noise(rate=0.2, cpu=0), ""),
        (90, {}, QUIET, ""),
    ],
)  # fmt: skip
def test_nothing_is_met_by_less_than_the_noise(measured, options, noise, verdict):
    """What misses its target misses it, however loud the machine is."""
    assert figure(measured, **options).verdict(noise) == verdict


def test_the_noise_is_the_middle_half_of_the_samples():
    """Some outliers do not change it."""
    noise = Noise.of(rates=[100, 90, 110, 100, 5], cpu=[10, 10, 10, 10, 99])
    assert noise == Noise(rate=0.1, cpu=0)
