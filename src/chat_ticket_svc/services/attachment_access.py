"""The rule that the file URLs of attachments are accessible when they are set."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from chat_ticket_svc import errors

if TYPE_CHECKING:  # imported at run time only when URLs are checked
    from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

T = TypeVar("T")


async def find_stored_or_check_urls(
    checker: "AttachmentUrlChecker | None",
    tenant_id: str,
    urls: Sequence[str],
    find_stored: Callable[[], Awaitable[T | None]],
) -> T | None:
    """Return what an earlier attempt of this call has stored, or None when `urls` are accessible.

    A retry succeeds even when its URLs are no longer accessible. So `find_stored` runs before the
    check. It runs again when the check fails, because the earlier attempt may have been in flight
    at first. The check runs before the transaction, and holds no connection to the database.
    """
    if checker is None or not urls:
        return None
    stored = await find_stored()
    if stored is not None:
        return stored
    inaccessible = await checker.find_inaccessible(tenant_id, urls)
    if not inaccessible:
        return None
    stored = await find_stored()
    if stored is not None:
        return stored
    positions = ", ".join(str(position + 1) for position in inaccessible)
    raise errors.FailedPreconditionError(
        f"file_url not accessible: attachment {positions} of the request",
        reason="ATTACHMENT_URL_NOT_ACCESSIBLE",
        subject="file_url",
    )
