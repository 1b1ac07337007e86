"""`chat-ticket-svc erase`: delete a whole tenant."""

import argparse
import sys

from tqdm import tqdm

from chat_ticket_svc.commands import arguments
from chat_ticket_svc.commands.migrated_database import run_on_database
from chat_ticket_svc.store import tenants
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.tenants import Count

# Of the active tickets that a refusal names.
NAMED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", type=arguments.tenant_id, required=True, metavar="ID")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be deleted")
    parser.add_argument(
        "--active-tickets",
        action="store_true",
        help="also erase open and pending tickets; without this they make it refuse",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def run(options: argparse.Namespace) -> int:
    return run_on_database(
        lambda db: erase(
            db,
            options.tenant,
            dry_run=options.dry_run,
            active_tickets=options.active_tickets,
            confirmed=options.yes,
        )
    )


async def erase(
    db: Database, tenant_id: str, *, dry_run: bool, active_tickets: bool, confirmed: bool
) -> int:
    """Count, refuse or ask, and delete in batches; returns the exit status.

    Cut off in the middle it goes on when it is called again. Followers of a session hear that it is
    gone as they would of any other deletion.
    """
    counted = await tenants.count(db, tenant_id)
    if not any(counted):
        print(f"the tenant {tenant_id} has nothing")
        return 0
    print(f"the tenant {tenant_id} has {_describe(counted)}")
    if counted.active_tickets and not active_tickets:
        await _refuse(db, tenant_id, counted.active_tickets)
        return 1
    if dry_run:
        print("nothing was erased: this was a dry run")
        return 0
    if not confirmed and not _confirms(tenant_id):
        print("chat-ticket-svc: nothing was erased: not confirmed (see --yes)", file=sys.stderr)
        return 1
    total = counted.sessions + counted.messages + counted.tombstones
    total += counted.chat_tickets + counted.tickets
    with tqdm(total=total, unit=" rows", unit_scale=True, disable=None, leave=False) as bar:
        async for deleted in tenants.erase(db, tenant_id, active_tickets=active_tickets):
            bar.update(deleted)
    left = await tenants.count(db, tenant_id)
    if any(left):
        print(
            f"chat-ticket-svc: the tenant has {_describe(left)} again; stop its callers and repeat",
            file=sys.stderr,
        )
        return 1
    print(f"erased: the tenant {tenant_id} has nothing any more")
    return 0


def _describe(counted: Count) -> str:
    names = {
        "sessions": counted.sessions,
        "messages": counted.messages,
        "attachments": counted.attachments,
        "tombstones": counted.tombstones,
        "chat tickets": counted.chat_tickets,
        f"tickets ({counted.active_tickets} of them active)": counted.tickets,
    }
    return ", ".join(f"{number:,} {name}" for name, number in names.items())


async def _refuse(db: Database, tenant_id: str, active: int) -> None:
    named = (await tenants.oldest_tickets(db, tenant_id, active=True))[:NAMED]
    lines = [f"  {ticket.id} ({ticket.status})" for ticket in named]
    if active > len(named):
        lines.append(f"  and {active - len(named):,} more")
    print(
        "chat-ticket-svc: nothing was erased, as tickets are open or pending:",
        *lines,
        "solve or close them, or say --active-tickets to erase them as well",
        sep="\n",
        file=sys.stderr,
    )


def _confirms(tenant_id: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return input("type the id of the tenant to erase all of this: ") == tenant_id
