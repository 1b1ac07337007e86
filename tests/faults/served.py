"""The service as the harness runs it: `python -m faults.served serve`.

It tells how many tasks it has when it is asked by SIGUSR1, and is a mutant when it is to be one.
"""

import asyncio
import json
import os
import signal
import sys

from chat_ticket_svc import cli
from faults.mutants import MUTANTS

MUTANT = "FAULTS_MUTANT"


def _tell(*_: object) -> None:
    print(json.dumps({"event": "tasks", "count": len(asyncio.all_tasks())}), flush=True)


def main() -> None:
    signal.signal(signal.SIGUSR1, _tell)
    if mutant := os.environ.get(MUTANT):
        MUTANTS[mutant].switch_on()
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
