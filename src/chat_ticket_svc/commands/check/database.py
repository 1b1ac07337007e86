"""Checks the database: its version, migrations and search index, its sessions, a write, the change
feed, its collation, its LC_CTYPE and its clock.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

from chat_ticket_svc.commands.check.feed import check_epoch, check_holder
from chat_ticket_svc.commands.check.line import FAILED, OK, WARNING, CheckFailed, Line, run_check
from chat_ticket_svc.commands.check.service import DEFAULT_TENANT
from chat_ticket_svc.config import Settings
from chat_ticket_svc.store import schema, trial_write
from chat_ticket_svc.store.connection import SET_BY_SUPERUSERS, require_valid_url

MIN_POSTGRESQL_VERSION = 15
# Tokens are valid to the second, and ids and times of rows come from both clocks.
MAX_CLOCK_DIFFERENCE_SECONDS = 1.0
# With another value of these, rules may be broken or acknowledged writes lost. The others change
# when a call fails.
UNSAFE_SETTINGS = {
    "default_transaction_isolation",
    "session_replication_role",
    "synchronous_commit",
}


async def check_database(settings: Settings) -> AsyncIterator[Line]:
    if not settings.database_url:
        yield Line(FAILED, "database", "DATABASE_URL: required")
        return
    timeouts = {
        "statement_timeout": settings.statement_timeout_ms,
        "lock_timeout": settings.lock_timeout_ms,
    }
    reading = asyncio.create_task(_read_facts("DATABASE_URL", settings.database_url, **timeouts))

    async def database() -> Line:
        facts = await reading
        text = f"PostgreSQL {facts.version}, responds in {1000 * facts.seconds:.1f} ms"
        if facts.version_number < MIN_POSTGRESQL_VERSION * 10_000:
            raise CheckFailed(f"{text}: version {MIN_POSTGRESQL_VERSION} or newer is required")
        if facts.is_read_only:
            raise CheckFailed(
                f"{text}: is read-only: a standby, or by default_transaction_read_only"
            )
        return Line(OK, "database", text)

    async def migrations() -> Line:
        facts = await reading
        if facts.missing:
            names = ", ".join(facts.missing)
            raise CheckFailed(f"lacks migrations {names}: run chat-ticket-svc migrate")
        newer = f", and {facts.newer} of a newer version" if facts.newer else ""
        return Line(OK, "schema", f"has all migrations of this version{newer}")

    async def search_index() -> Line:
        facts = await reading
        if not facts.search_index.is_built:
            text = "is missing or invalid, searches are slow: run chat-ticket-svc migrate"
            return Line(WARNING, "index", text)
        if facts.search_index.is_stale:
            builder = facts.search_index.built_by
            known = f"was built by PostgreSQL {builder}" if builder else "does not say who built it"
            text = (
                f"{known}, this is {facts.version_number // 10_000}: words may be missing, as their"
                " stems differ; run chat-ticket-svc reindex, which builds it anew"
            )
            return Line(WARNING, "index", text)
        if facts.search_index.unused:
            text = (
                f"also there, and not used by servers of this version:"
                f" {', '.join(facts.search_index.unused)};"
                " run chat-ticket-svc reindex when every server is of this version"
            )
            return Line(WARNING, "index", text)
        return Line(OK, "index", "the search index is built")

    async def session() -> Line:
        facts = await reading
        return _session_line("session", facts.differing_settings)

    async def write() -> Line:
        started_at = time.perf_counter()
        await trial_write.try_write(settings.database_url, DEFAULT_TENANT)
        milliseconds = 1000 * (time.perf_counter() - started_at)
        text = f"a row of each table, rolled back, took {milliseconds:.1f} ms"
        return Line(OK, "write", text)

    async def clock() -> Line:
        facts = await reading
        is_close = abs(facts.clock_ahead) < MAX_CLOCK_DIFFERENCE_SECONDS
        text = f"{facts.clock_ahead:+.3f} s compared to the database's clock"
        return Line(OK if is_close else WARNING, "clock", text)

    yield await run_check("database", database())
    if reading.done() and not reading.cancelled() and reading.exception() is None:
        facts = reading.result()
        yield await run_check("schema", migrations())
        if not facts.missing:
            yield await run_check("index", search_index())
        yield await run_check("session", session())
        if not facts.missing and not facts.is_read_only:
            yield await run_check("write", write())
        if not facts.missing:
            yield await run_check("feed", check_holder(settings.database_url))
            yield await run_check("epoch", check_epoch(settings.database_url))
        if facts.collation is not None:
            yield _collation(facts.collation)
        yield _ctype(facts.ctype)
        yield await run_check("clock", clock())
    if settings.listen_url != settings.database_url:

        async def listen() -> Line:
            facts = await _read_facts("DATABASE_LISTEN_URL", settings.listen_url)
            return Line(OK, "listen", f"responds in {1000 * facts.seconds:.1f} ms")

        yield await run_check("listen", listen())


def _session_line(subject: str, differing: Mapping[str, str]) -> Line:
    if not differing:
        return Line(OK, subject, "has the settings that this service relies on")
    settings = ", ".join(f"{name} {text}" for name, text in sorted(differing.items()))
    cause = ", as a pooler drops them" if differing.keys() - SET_BY_SUPERUSERS else ""
    text = f"has other settings than this service needs{cause}: {settings}"
    return Line(FAILED if differing.keys() & UNSAFE_SETTINGS else WARNING, subject, text)


def _collation(collation: schema.Collation) -> Line:
    recorded, actual, indexes = collation
    if recorded == actual:
        return Line(
            OK, "collation", f"version {actual}, as recorded" if actual else "has no versions"
        )
    return Line(
        WARNING,
        "collation",
        f"version {actual or 'none'}, but {recorded} was recorded: indexes of text may be out of"
        f" order, {indexes} of the service; REINDEX the database, then"
        " ALTER DATABASE ... REFRESH COLLATION VERSION",
    )


def _ctype(ctype: schema.Ctype) -> Line:
    if ctype.folds_case:
        return Line(OK, "ctype", "searches ignore the case of letters")
    return Line(
        WARNING,
        "ctype",
        f"the database's LC_CTYPE is {ctype.name}: searches ignore the case of ASCII letters only;"
        " create the database with a UTF-8 locale such as C.UTF-8, and move the data by pg_dump",
    )


async def _read_facts(variable: str, url: str, **session_settings: int) -> schema.Facts:
    require_valid_url(variable, url)
    return await schema.facts(url, **session_settings)
