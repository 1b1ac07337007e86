"""Rule 3 for new attachments: their URLs are accessible, unless the call is a repeat."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from chat_ticket_svc import errors
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

T = TypeVar("T")


async def repeat_or_check(
    checker: AttachmentUrlChecker | None,
    tenant_id: str,
    urls: Sequence[str],
    repeated: Callable[[], Awaitable[T | None]],
) -> T | None:
    """What `repeated` finds stored already, or None when the URLs may be stored.

    A repeat is answered whatever has become of the URLs, also when it and the first call have
    crossed: so it is looked up before the check, and again when the check refuses. The check runs
    before the transaction, and holds no connection.
    """
    if checker is None or not urls:
        return None
    stored = await repeated()
    if stored is not None:
        return stored
    refused = await checker.inaccessible(tenant_id, urls)
    if not refused:
        return None
    stored = await repeated()
    if stored is not None:
        return stored
    positions = ", ".join(str(position + 1) for position in refused)
    raise errors.FailedPreconditionError(
        f"the file URL is not accessible (attachment {positions} of the request)",
        reason="ATTACHMENT_URL_NOT_ACCESSIBLE",
        subject="file_url",
    )
