"""Every reason that an error of the service can carry, as docs/reference/errors.md lists it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A reason that an error can carry, as docs/reference/errors.md lists it.

    `status` is the name of the gRPC status; `action` is what the caller does about the error.
    """

    name: str
    status: str
    meaning: str
    action: str


# What NotFoundError and AlreadyExistsError are about, and what callers know it as.
_RESOURCES = {
    "chat_session": "session",
    "chat_message": "message",
    "chat_draft": "draft",
    "chat_attachment": "attachment",
    "chat_ticket": "chat ticket",
    "ticket": "ticket",
}

_FIX_REQUEST = "Correct the request. Repeating it unchanged fails again."
_NEW_CREDENTIAL = "Get a new credential, then retry."
_OTHER_CREDENTIAL = "Use a credential that allows it. Retrying with this one fails again."
_RETRY = "Retry after the delay in `RetryInfo`."

# Every reason, in the order of the statuses. A test compares it with the code that raises them.
REASONS = (
    Reason(
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        "A field is malformed or over its limit, or a field mask, page token or tenant id is "
        "malformed. `BadRequest` lists up to 100 violations, in at most 3,500 bytes. The metadata "
        "counts the others as `omitted_violations`.",
        _FIX_REQUEST,
    ),
    Reason(
        "CREDENTIAL_REQUIRED",
        "UNAUTHENTICATED",
        "The call carries no token where tokens are required.",
        "Send `authorization: Bearer` and a token.",
    ),
    Reason(
        "CREDENTIAL_INVALID",
        "UNAUTHENTICATED",
        "The token is not valid here, or the client certificate belongs to no listed caller.",
        _NEW_CREDENTIAL,
    ),
    Reason(
        "CREDENTIAL_EXPIRED",
        "UNAUTHENTICATED",
        "The token or certificate has expired. It also ends a stream that is open.",
        _NEW_CREDENTIAL,
    ),
    Reason(
        "TENANT_REQUIRED",
        "UNAUTHENTICATED",
        "`x-tenant-id` is missing, and the credential does not allow exactly one tenant.",
        "Send `x-tenant-id`.",
    ),
    Reason(
        "TENANT_NOT_ALLOWED",
        "PERMISSION_DENIED",
        "The credential is not for this tenant.",
        _OTHER_CREDENTIAL,
    ),
    Reason(
        "PERMISSION_REQUIRED",
        "PERMISSION_DENIED",
        "The credential lacks the permission that the method needs.",
        _OTHER_CREDENTIAL,
    ),
    Reason(
        "METHOD_NOT_ALLOWED",
        "PERMISSION_DENIED",
        "No permission is defined for the method. A server with such a method does not start.",
        "Report it.",
    ),
    *(
        Reason(
            f"{resource.upper()}_NOT_FOUND",
            "NOT_FOUND",
            f"The {name} does not exist, or belongs to another tenant.",
            _FIX_REQUEST,
        )
        for resource, name in _RESOURCES.items()
    ),
    *(
        Reason(
            f"{resource.upper()}_ALREADY_EXISTS",
            "ALREADY_EXISTS",
            {
                "chat_message": "The id belongs to a different or a deleted message, or to an open "
                "draft.",
                "chat_session": "The id belongs to a session of another user.",
            }.get(resource, f"The id belongs to a different {name}."),
            "Choose a new id.",
        )
        for resource, name in _RESOURCES.items()
    ),
    Reason(
        "CHAT_SESSION_DELETED",
        "ALREADY_EXISTS",
        "The id belongs to a session that was deleted.",
        "Choose a new id, unless the call is a late repeat of the creation of that session.",
    ),
    Reason(
        "DRAFT_OPEN",
        "ALREADY_EXISTS",
        "The draft is to be the only open one of its session, which has another. `ResourceInfo` "
        "names it.",
        "Leave the answer to the other writer, or stop its draft first.",
    ),
    Reason(
        "EXTERNAL_REF_TAKEN",
        "ALREADY_EXISTS",
        "Another ticket of the tenant has this `external_ref`. The metadata has its `ticket_id`.",
        "Use that ticket, or another reference.",
    ),
    Reason(
        "SESSION_HAS_TICKET",
        "ALREADY_EXISTS",
        "The session has a ticket already.",
        "Use the existing ticket, or unlink it first.",
    ),
    Reason(
        "SESSION_ARCHIVED",
        "FAILED_PRECONDITION",
        "An archived session cannot get a ticket.",
        "Change the session's status first.",
    ),
    Reason(
        "SESSION_HAS_ACTIVE_TICKET",
        "FAILED_PRECONDITION",
        "A session whose ticket is open or pending cannot be deleted.",
        "Solve, close or unlink the ticket first.",
    ),
    Reason(
        "TICKET_LINKED",
        "FAILED_PRECONDITION",
        "A ticket that is linked to a session cannot be deleted.",
        "Unlink it from its sessions first.",
    ),
    Reason(
        "TICKET_HAS_TOO_MANY_SESSIONS",
        "FAILED_PRECONDITION",
        "The ticket has as many sessions as it may have; to change it, it has more.",
        "Use another ticket, or unlink the ticket from some of its sessions.",
    ),
    Reason(
        "ATTACHMENT_URL_NOT_ACCESSIBLE",
        "FAILED_PRECONDITION",
        "The URL of an attachment is not accessible. The error does not say why.",
        "Check that the URL is public and answers within three seconds.",
    ),
    Reason(
        "CHAT_MESSAGE_REDACTED",
        "FAILED_PRECONDITION",
        "The message is redacted, and takes neither metadata nor attachments.",
        "Leave the message as it is.",
    ),
    Reason(
        "TOO_MANY_ATTACHMENTS",
        "FAILED_PRECONDITION",
        "The message has as many attachments as it may have.",
        "Delete an attachment, or use another message.",
    ),
    Reason(
        "TOO_MANY_LABELS",
        "FAILED_PRECONDITION",
        "The session would have more labels than it may have.",
        "Remove a label first, or in the same call.",
    ),
    Reason(
        "TOO_MANY_DRAFTS",
        "FAILED_PRECONDITION",
        "The session has as many open drafts as it may have.",
        "Finish or stop one of them first.",
    ),
    Reason(
        "ETAG_MISMATCH",
        "ABORTED",
        "The session, the message or the ticket has changed since the caller read it. The metadata "
        "has its `revision`.",
        "Read it again, then decide.",
    ),
    Reason(
        "CONTENTION",
        "ABORTED",
        "A conflict or a lock timeout; the server's own retries are exhausted.",
        _RETRY,
    ),
    Reason(
        "DRAFT_CONFLICT",
        "ABORTED",
        "The text differs from what the draft has at this offset. The metadata has the `length` of "
        "the draft.",
        "Two writers have written different answers. Read the draft, then go on from its length, "
        "or use another id.",
    ),
    Reason(
        "DRAFT_TAKEN_OVER",
        "ABORTED",
        "Another stream has taken over the draft. This one can write no more.",
        "Leave the draft to the other writer.",
    ),
    Reason(
        "DRAFT_GAP",
        "OUT_OF_RANGE",
        "The text begins after the end of the draft. The metadata has its `length`.",
        "Send the text from this length on. A failover can lose text that was acknowledged.",
    ),
    Reason(
        "REVISION_OUT_OF_RANGE",
        "OUT_OF_RANGE",
        "The session has not reached this revision. A failover can lose revisions.",
        "Watch the session again from revision 0.",
    ),
    Reason(
        "HISTORY_CHANGED",
        "OUT_OF_RANGE",
        "The database has lost changes up to the position, because it was restored from a backup "
        "or a standby was promoted. For a session, the metadata has the last `revision` that both "
        "histories share, and the current `epoch`. For a cursor of WatchChatSessions, it has the "
        "`cursor` of what is shared, if one is known.",
        "Forget what came after that revision, read again what had changed after it, and go on "
        "after it with the `epoch` of the metadata. Go on after the `cursor` of the metadata; "
        "without one, begin again.",
    ),
    Reason(
        "CURSOR_EXPIRED",
        "OUT_OF_RANGE",
        "The cursor is so old that deletions after it are forgotten.",
        "Begin again with `from_beginning`. What is not told again is deleted.",
    ),
    Reason(
        "QUOTA_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "A quota is used up: the metadata names it, `QuotaFailure` says whose it is.",
        _RETRY,
    ),
    Reason(
        "POOL_QUEUE_FULL",
        "RESOURCE_EXHAUSTED",
        "Too many calls wait for a database connection.",
        _RETRY,
    ),
    Reason(
        "POOL_TIMEOUT",
        "RESOURCE_EXHAUSTED",
        "The database connections that the tenant may use were busy for 2 seconds. Nothing was "
        "done.",
        _RETRY,
    ),
    Reason("DISK_FULL", "RESOURCE_EXHAUSTED", "The database's disk is full.", _RETRY),
    Reason(
        "DATABASE_RESOURCES",
        "RESOURCE_EXHAUSTED",
        "The database is out of memory, connections or another resource.",
        _RETRY,
    ),
    Reason(
        "SLOW_READER",
        "RESOURCE_EXHAUSTED",
        "The client did not read its stream for too long.",
        "Read faster. Resume after the last revision or sequence received.",
    ),
    Reason(
        "URL_CHECKS_BUSY",
        "RESOURCE_EXHAUSTED",
        "Too many attachment URLs are being checked, for this tenant or for all.",
        _RETRY,
    ),
    Reason(
        "DATABASE_UNAVAILABLE",
        "UNAVAILABLE",
        "The database cannot be reached. Nothing was done.",
        _RETRY,
    ),
    Reason(
        "DATABASE_READ_ONLY",
        "UNAVAILABLE",
        "The database is read-only: a standby, or a failover under way. Nothing was done.",
        _RETRY,
    ),
    Reason(
        "STATEMENT_CANCELED",
        "UNAVAILABLE",
        "Somebody canceled the statement in the database, for example with `pg_cancel_backend`. "
        "Nothing was done.",
        _RETRY,
    ),
    Reason(
        "KEYS_UNAVAILABLE",
        "UNAVAILABLE",
        "The keys that verify tokens cannot be read.",
        _RETRY,
    ),
    Reason(
        "DRAINING",
        "UNAVAILABLE",
        "The server shuts down and ends its watches and the streams that write drafts.",
        "Resume on another server: a watch after the last revision received, a draft from the "
        "length in `started`.",
    ),
    Reason(
        "OUTCOME_UNKNOWN",
        "UNAVAILABLE",
        "The connection to the database broke during a write, which may have succeeded. The "
        "metadata has the ids that the server chose, if the request had none.",
        "With `RetryInfo`, repeat the request as it is. Without it, repeat it with the ids in the "
        "metadata, or read what is stored.",
    ),
    Reason(
        "DEADLINE_EXCEEDED",
        "DEADLINE_EXCEEDED",
        "The deadline passed: the caller's, or the server's for calls without one. A write that "
        "arrives with less than 50 ms left is not begun. A write that has begun may have "
        "succeeded. The metadata has the ids that the server chose, if the request had none.",
        "Retry with the same ids, or with those in the metadata.",
    ),
    Reason(
        "UNSUPPORTED_BY_DATABASE",
        "UNIMPLEMENTED",
        "The database server lacks a feature that the call needs.",
        "Report it to the operator.",
    ),
    Reason(
        "INTERNAL",
        "INTERNAL",
        "A bug. The metadata has the `correlation_id` of the log line.",
        "Report the `correlation_id` to the operator.",
    ),
)
