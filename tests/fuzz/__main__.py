"""Sends hostile requests to a new server, and prints a table and the findings."""

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import time

import tqdm
from support.cluster import Cluster, Run
from support.process import server_process

from fuzz.run import OURS, STANDARD, Report, bystander, run_batch

BATCH = 200


# Events that a healthy server logs.
HEALTHY_EVENTS = {"listening", "serving", "not serving", "draining"}


async def run(address: str, count: int, seed: int, report: Report) -> None:
    """Send `count` values and as many bytes, in batches of all methods in turn."""
    all_methods = [*OURS, *STANDARD]
    batch_size = min(BATCH, -(-count // len(all_methods)))
    async with bystander(address):
        with tqdm.tqdm(total=2 * count, unit="call", smoothing=0.05) as progress:
            report.write = progress.write
            for as_bytes in (False, True):
                remaining = count
                for number, method in enumerate(itertools.cycle(all_methods)):
                    if not remaining:
                        break
                    remaining -= (
                        sent := await run_batch(
                            address,
                            method,
                            as_bytes=as_bytes,
                            count=min(batch_size, remaining),
                            seed=seed + number,
                            report=report,
                        )
                    )
                    progress.update(sent)
                    progress.set_postfix(findings=sum(map(len, report.findings.values())))


def table(report: Report) -> str:
    """The answers, RPC by status."""
    codes = sorted({code for _, code in report.counts})
    names = sorted({name for name, _ in report.counts})
    rows = [["", *codes, "all"]]
    for name in names:
        counts = [report.counts[name, code] for code in codes]
        rows.append([name, *(str(count or "") for count in counts), str(sum(counts))])
    totals = [sum(report.counts[name, code] for name in names) for code in codes]
    rows.append(["all", *map(str, totals), str(sum(totals))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> None:

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="of values, and of bytes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    options = parser.parse_args()
    print(f"SEED={options.seed}", flush=True)
    began = time.monotonic()
    report = Report()
    postgres = Run()
    try:
        database = Cluster(postgres.url).create()
        settings = {
            "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
            "CHAT_TICKET_ACCESS_LOG": "false",
            # The other tenant's drafts stay open to the end.
            "CHAT_TICKET_DRAFT_SECONDS": "3600",
            "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
        }
        with server_process(database, **settings) as server:
            with contextlib.suppress(KeyboardInterrupt):  # the findings so far are printed
                asyncio.run(run(server.address, options.count, options.seed, report))
            for line in server.log:
                if line["event"] not in HEALTHY_EVENTS:
                    report.findings["the log", line["event"]].append(str(line))
            if server.popen.poll() is not None:
                report.findings["the process", str(server.popen.returncode)].append("has died")
    finally:
        postgres.close()
    print(table(report), report.summary, sep="\n\n")
    print(
        f"\nSEED={options.seed}: {sum(report.counts.values())} calls in "
        f"{time.monotonic() - began:.0f} s, {len(report.findings)} kinds of findings"
    )
    sys.exit(bool(report.findings))


if __name__ == "__main__":
    main()
