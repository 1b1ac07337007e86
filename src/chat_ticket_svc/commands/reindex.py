"""`chat-ticket-svc reindex`: brings messages to the search languages of their tenants.

Before, it builds the search index if that is missing, or of another major version of PostgreSQL.
"""

import argparse

from tqdm import tqdm

from chat_ticket_svc import config
from chat_ticket_svc.commands import arguments, migrate
from chat_ticket_svc.commands.migrated_database import run_on_database
from chat_ticket_svc.store import reindexing, tenants
from chat_ticket_svc.store.database import Database


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "MIGRATE_DATABASE_URL is for the search index, and DATABASE_URL for the messages."
        f" {config.variable('search_language')} must be that of the servers: with another value,"
        " tenants that have none of their own get the wrong search language."
    )
    parser.add_argument(
        "--tenant",
        type=arguments.tenant_id,
        metavar="ID",
        help="reindex only this tenant; without it, all tenants, and then the search index of"
        " servers of the version before is dropped: run it when every server is of this version",
    )


def run(options: argparse.Namespace) -> int:
    url = migrate.database_url()
    migrate.build_search_index(url, renew=True)
    default_language = config.load().search_language
    status = run_on_database(lambda db: reindex(db, options.tenant, default_language))
    # Last, so that what fails leaves the servers of the version before their index.
    if status == 0 and options.tenant is None:
        migrate.drop_unused_search_indexes(url)
    return status


async def reindex(db: Database, tenant_id: str | None, default_language: str) -> int:
    """Reindex a tenant, or all of them, in batches. Returns the exit status.

    After an interruption, run it again to reindex the rest.
    """
    read = changed = 0
    total = await reindexing.count_messages(db, tenant_id)
    tenant = await tenants.next_tenant(db, "") if tenant_id is None else tenant_id
    with tqdm(total=total, unit=" messages", unit_scale=True, disable=None, leave=False) as bar:
        while tenant is not None:
            async for batch in reindexing.reindex(db, tenant, default_language=default_language):
                read += batch.read
                changed += batch.changed
                bar.update(batch.read)
            tenant = await tenants.next_tenant(db, tenant) if tenant_id is None else None
    # Some that were changed may have been deleted before they were counted as read.
    print(f"changed the search language of {changed:,} of {max(read, changed):,} messages")
    return 0
