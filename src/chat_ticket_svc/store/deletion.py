"""What the deletions of all resources share: `allow_missing`."""

import contextlib

from chat_ticket_svc import errors


def missing_allowed(allow_missing: bool) -> contextlib.AbstractContextManager[None]:
    """Suppress NotFoundError in the block, if the caller allows that nothing is there to delete.

    The deletion can then be repeated after it was committed: it finds nothing, which is no error.
    """
    return contextlib.suppress(errors.NotFoundError) if allow_missing else contextlib.nullcontext()
