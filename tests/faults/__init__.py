"""Faults on purpose: a workload, what breaks it, and a checker of what must hold all the same."""
