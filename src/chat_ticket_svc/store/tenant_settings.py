"""What an operator has set for a tenant."""

from chat_ticket_svc.store.database import Database

GET_SEARCH_LANGUAGE = """
SELECT search_language FROM tenant_settings WHERE tenant_id = %(tenant_id)s
"""

SET_SEARCH_LANGUAGE = """
INSERT INTO tenant_settings (tenant_id, search_language)
VALUES (%(tenant_id)s, %(search_language)s)
ON CONFLICT (tenant_id)
DO UPDATE SET search_language = EXCLUDED.search_language, updated_at = now()
RETURNING search_language
"""


async def get_search_language(db: Database, tenant_id: str) -> str | None:
    """The search language that is set for a tenant, or None if it has that of the service."""
    rows = await db.fetch_all(GET_SEARCH_LANGUAGE, {"tenant_id": tenant_id}, lambda *row: row)
    return rows[0][0] if rows else None


async def set_search_language(db: Database, tenant_id: str, search_language: str | None) -> None:
    """Set it for the messages that come. None means that of the service."""
    params = {"tenant_id": tenant_id, "search_language": search_language}
    await db.write(SET_SEARCH_LANGUAGE, params, str, idempotent=True)
