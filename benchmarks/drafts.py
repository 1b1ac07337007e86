"""Drafts: what storing answers piece by piece costs PostgreSQL."""

from collections.abc import Mapping

from benchmarks import draft_storage
from benchmarks.draft_storage import Cost, Way, Workload
from benchmarks.figures import Figure
from benchmarks.service import Bench

NAME = "drafts"
SECONDS = 60


def measure(bench: Bench) -> list[Figure]:
    costs: dict[tuple[Workload, Way], Cost] = {}
    for workload in draft_storage.WORKLOADS:
        for way in draft_storage.WAYS:
            bench.progress(f"{workload.name}, {way.name}")
            costs[workload, way] = draft_storage.measure(bench, way, workload)
    return _storage_figures(costs)


def _storage_figures(costs: Mapping[tuple[Workload, Way], Cost]) -> list[Figure]:
    """One round, because the bytes are the same in each."""
    figures = []
    for (workload, way), cost in costs.items():
        if way is draft_storage.PIECES:
            continue
        ours = costs[workload, draft_storage.PIECES]
        for name, unit, measured, limit in (
            ("WAL", "bytes/piece", ours.wal_bytes, cost.wal_bytes),
            ("PostgreSQL's CPU", "µs/piece", ours.cpu_us, cost.cpu_us),
            ("tables afterwards", "MB", ours.table_bytes / 1e6, cost.table_bytes / 1e6),
        ):
            figures.append(
                Figure(
                    part=NAME,
                    name=f"{name}, {workload.name}",
                    unit=unit,
                    measured=[measured],
                    limit=[limit],
                    against=way.name,
                    at_most=True,
                    details={"ours": ours, "other": cost},
                )
            )
    return figures
