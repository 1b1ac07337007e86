"""`chat-ticket-svc erase`: deletes a tenant, or one of its users, and all their data."""

import argparse
import signal
import sys

from tqdm import tqdm

from chat_ticket_svc.commands import arguments
from chat_ticket_svc.commands.migrated_database import run_on_database
from chat_ticket_svc.store import erasure, tenants
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.tenants import Count

# The error names at most this many active tickets.
MAX_NAMED_TICKETS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_required_tenant(parser, "the tenant to delete, or whose user to delete")
    arguments.add_user(parser, "delete only the sessions of this user, and their tickets")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be deleted")
    parser.add_argument(
        "--active-tickets",
        action="store_true",
        help="also delete sessions whose ticket is open or pending, and such tickets unless they"
        " serve sessions of other users too; without this they block the deletion",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def run(options: argparse.Namespace) -> int:
    return run_on_database(
        lambda db: erase(
            db,
            options.tenant,
            options.user,
            dry_run=options.dry_run,
            active_tickets=options.active_tickets,
            is_confirmed=options.yes,
        )
    )


async def erase(
    db: Database,
    tenant_id: str,
    user_id: str | None,
    *,
    dry_run: bool,
    active_tickets: bool,
    is_confirmed: bool,
) -> int:
    """Count the rows of the tenant or the user, ask for confirmation, and delete in batches.

    Returns the exit status. After an interruption, run it again to delete the rest. Watchers of a
    session receive its deletion like any other.
    """
    erased = arguments.describe(tenant_id, user_id)
    counts = await tenants.count(db, tenant_id, user_id)
    if not any(counts):
        print(f"{erased} has no data")
        return 0
    print(f"{erased} has {_describe(counts)}")
    if counts.active_tickets and not active_tickets:
        await _print_active_tickets(db, tenant_id, user_id, counts.active_tickets)
        return 1
    if dry_run:
        print("nothing was deleted: dry run")
        return 0
    if not is_confirmed and not _ask_for_confirmation(tenant_id, user_id):
        print("chat-ticket-svc: nothing was deleted: not confirmed (see --yes)", file=sys.stderr)
        return 1
    total = counts.sessions + counts.messages + counts.tombstones + counts.chat_tickets
    total += counts.tickets - counts.shared_tickets + counts.settings
    with tqdm(total=total, unit=" rows", unit_scale=True, disable=None, leave=False) as bar:
        async for deleted in erasure.erase(db, tenant_id, user_id, active_tickets=active_tickets):
            bar.update(deleted)
    left = await tenants.count(db, tenant_id, user_id)
    if any(left):
        callers = "its" if user_id is None else "the user's"
        print(
            f"chat-ticket-svc: {erased} still has {_describe(left)}:"
            f" stop {callers} callers and run this again",
            file=sys.stderr,
        )
        return 1
    print(f"{erased} is erased")
    return 0


def _describe(counts: Count) -> str:
    names = {
        "sessions": counts.sessions,
        "messages": counts.messages,
        "attachments": counts.attachments,
        "message tombstones": counts.tombstones,
        "drafts": counts.drafts,
        "chat tickets": counts.chat_tickets,
        f"tickets ({counts.active_tickets} of them active)": counts.tickets,
        "rows of settings": counts.settings,
    }
    text = ", ".join(f"{number:,} {name}" for name, number in names.items())
    if counts.shared_tickets:
        text += f"; tickets that serve other sessions too, and stay: {counts.shared_tickets:,}"
    return text


async def _print_active_tickets(
    db: Database, tenant_id: str, user_id: str | None, active: int
) -> None:
    page = await tenants.oldest_tickets(db, tenant_id, user_id, active=True)
    oldest = page[:MAX_NAMED_TICKETS]
    lines = [f"  {ticket.id} ({ticket.status})" for ticket in oldest]
    if active > len(oldest):
        lines.append(f"  and {active - len(oldest):,} more")
    holder, effect = "the tenant", "to delete them too"
    if user_id is not None:
        holder, effect = "the user", "to unlink them, and to delete those that serve nobody else"
    print(
        f"chat-ticket-svc: nothing was deleted: {holder} has open or pending tickets:",
        *lines,
        f"solve or close them, or pass --active-tickets {effect}",
        sep="\n",
        file=sys.stderr,
    )


def _ask_for_confirmation(tenant_id: str, user_id: str | None) -> bool:
    if not sys.stdin.isatty():
        return False
    # asyncio's handler would cancel this task, which does not notice while it reads.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if user_id is None:
            return input("type the tenant's id to delete all of this: ") == tenant_id
        return input("type the user's id to delete all of this: ") == user_id
    except EOFError:
        return False
    finally:
        signal.signal(signal.SIGINT, handler)
