"""`chat-ticket-svc expire`: deletes the sessions whose last change is too long ago."""

import argparse
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from chat_ticket_svc.commands import arguments, retention_policy
from chat_ticket_svc.commands.migrated_database import run_on_database
from chat_ticket_svc.commands.retention_policy import Policy
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store import retention, tenants
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.retention import Expired, Rule
from chat_ticket_svc.store.session_listing import STATUSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sessions with an open or pending ticket are kept, and so are all tickets. Servers may"
        " run meanwhile."
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--tenant", type=arguments.tenant_id, metavar="ID", help="the tenant whose sessions expire"
    )
    whose.add_argument(
        "--all-tenants", action="store_true", help="the sessions of all tenants expire"
    )
    whose.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="a TOML file with the periods of tenants, instead of --older-than and --status",
    )
    parser.add_argument(
        "--older-than",
        type=_duration,
        metavar="TIME",
        help="how long ago the last change of a session is, in days or hours: 400d or 36h",
    )
    parser.add_argument(
        "--status",
        type=_statuses,
        metavar="STATUS",
        help=f"only sessions of these statuses, separated by commas: {', '.join(STATUSES)}"
        " (default: all)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only count the sessions that would be deleted"
    )


def _duration(text: str) -> timedelta:
    try:
        return retention_policy.parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _statuses(text: str) -> list[str]:
    statuses = text.split(",")
    if unknown := sorted(set(statuses) - set(STATUSES)):
        known = ", ".join(STATUSES)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {known}")
    return statuses


def run(options: argparse.Namespace) -> int:
    if options.policy is None:
        if options.older_than is None:
            raise ConfigurationError("--older-than: required without --policy")
        rule = Rule(options.older_than, options.status)
        policy = Policy(rule, {}) if options.all_tenants else Policy(None, {options.tenant: rule})
    elif options.older_than is not None or options.status is not None:
        raise ConfigurationError("--older-than and --status: not with --policy")
    else:
        policy = retention_policy.load(options.policy)
    return run_on_database(lambda db: expire(db, policy, dry_run=options.dry_run))


async def expire(db: Database, policy: Policy, *, dry_run: bool) -> int:
    """Delete the expired sessions of each tenant in turn, and return the exit status.

    After an interruption, run it again to delete the rest. Watchers of a session receive its
    deletion like any other.
    """
    total = Expired(0, 0, 0)
    affected = 0
    with tqdm(unit=" sessions", unit_scale=True, disable=None, leave=False) as bar:
        async for tenant_id, rule in _rules(db, policy):
            bar.set_description(tenant_id, refresh=False)
            done = Expired(0, 0, 0)
            async for batch in retention.expire(db, tenant_id, rule, dry_run=dry_run):
                done = _sum(done, batch)
                bar.update(batch.sessions)
            if any(done):
                total = _sum(total, done)
                affected += 1
                tqdm.write(f"tenant {tenant_id}: {_describe(done, dry_run=dry_run)}")
    print(f"{affected:,} tenants: {_describe(total, dry_run=dry_run)}")
    if dry_run:
        print("nothing was deleted: dry run")
    return 0


async def _rules(db: Database, policy: Policy) -> AsyncIterator[tuple[str, Rule]]:
    """Each tenant that has a rule. Without a default, tenants without one are not looked for."""
    if policy.default is None:
        for item in policy.tenants.items():
            yield item
        return
    tenant_id = await tenants.next_tenant(db, "")
    while tenant_id is not None:
        yield tenant_id, policy.tenants.get(tenant_id, policy.default)
        tenant_id = await tenants.next_tenant(db, tenant_id)


def _sum(first: Expired, second: Expired) -> Expired:
    return Expired(*map(sum, zip(first, second, strict=True)))


def _describe(expired: Expired, *, dry_run: bool) -> str:
    done = (
        f"{expired.sessions:,} sessions would be deleted"
        if dry_run
        else f"deleted {expired.sessions:,} sessions with {expired.messages:,} messages"
    )
    return f"{done}, kept {expired.kept:,} with an open or pending ticket"
