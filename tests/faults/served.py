"""The service as the fault runs start it: `python -m faults.served serve`.

On SIGUSR1 it prints the number of its asyncio tasks. FAULTS_MUTANT names a mutant to switch on.
"""

import asyncio
import json
import os
import signal
import sys

from chat_ticket_svc import cli, event_engine

event_engine.disable_listener(os.environ)  # as `serve` does, before the mutants import gRPC

from faults.mutants import MUTANTS

MUTANT = "FAULTS_MUTANT"


def _print_task_count(*_: object) -> None:
    print(json.dumps({"event": "tasks", "count": len(asyncio.all_tasks())}), flush=True)


def main() -> None:
    signal.signal(signal.SIGUSR1, _print_task_count)
    if mutant := os.environ.get(MUTANT):
        MUTANTS[mutant].switch_on()
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
