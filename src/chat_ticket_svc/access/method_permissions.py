"""The permission that each method requires. The server does not serve a method without a rule."""

from collections.abc import Iterable, Mapping

from chat_ticket_svc.access.credential import Permission
from chat_ticket_svc.config import ConfigurationError

SESSIONS = "/chat_ticket.v1.ChatSessionService"
MESSAGES = "/chat_ticket.v1.ChatMessageService"
ATTACHMENTS = "/chat_ticket.v1.ChatAttachmentService"
TICKETS = "/chat_ticket.v1.ChatTicketService"
DRAFTS = "/chat_ticket.v1.ChatDraftService"

METHOD_PERMISSIONS: Mapping[str, Permission] = {
    f"{SESSIONS}/GetChatSession": Permission.READ,
    f"{SESSIONS}/ListChatSessions": Permission.READ,
    f"{SESSIONS}/WatchChatSession": Permission.READ,
    f"{SESSIONS}/WatchChatSessions": Permission.READ,
    f"{SESSIONS}/CreateChatSession": Permission.WRITE,
    f"{SESSIONS}/UpdateChatSession": Permission.WRITE,
    f"{SESSIONS}/DeleteChatSession": Permission.DELETE,
    f"{MESSAGES}/GetChatMessage": Permission.READ,
    f"{MESSAGES}/ListChatMessages": Permission.READ,
    f"{MESSAGES}/SearchChatMessages": Permission.READ,
    f"{MESSAGES}/CreateChatMessage": Permission.WRITE,
    f"{MESSAGES}/BatchCreateChatMessages": Permission.WRITE,
    f"{MESSAGES}/UpdateChatMessage": Permission.WRITE,
    f"{MESSAGES}/DeleteChatMessage": Permission.DELETE,
    f"{MESSAGES}/RedactChatMessage": Permission.DELETE,
    f"{ATTACHMENTS}/GetChatAttachment": Permission.READ,
    f"{ATTACHMENTS}/ListChatAttachments": Permission.READ,
    f"{ATTACHMENTS}/CreateChatAttachment": Permission.WRITE,
    f"{ATTACHMENTS}/UpdateChatAttachment": Permission.WRITE,
    f"{ATTACHMENTS}/DeleteChatAttachment": Permission.DELETE,
    f"{DRAFTS}/GetChatDraft": Permission.READ,
    f"{DRAFTS}/ListChatDrafts": Permission.READ,
    f"{DRAFTS}/WriteChatDraft": Permission.WRITE,
    f"{DRAFTS}/StopChatDraft": Permission.WRITE,
    f"{TICKETS}/GetChatTicket": Permission.READ,
    f"{TICKETS}/ListChatTickets": Permission.READ,
    f"{TICKETS}/GetTicket": Permission.READ,
    f"{TICKETS}/ListTickets": Permission.READ,
    f"{TICKETS}/CreateChatTicket": Permission.TICKET,
    # Not DELETE: it undoes an escalation, and no part of the conversation is lost.
    f"{TICKETS}/DeleteChatTicket": Permission.TICKET,
    f"{TICKETS}/CreateTicket": Permission.TICKET,
    f"{TICKETS}/UpdateTicket": Permission.TICKET,
    f"{TICKETS}/DeleteTicket": Permission.DELETE,
}

# Anyone who can reach the port may call these methods. They expose no tenant data.
UNAUTHENTICATED_METHODS = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)

# These methods change nothing, so a call is always safe to retry.
READ_METHODS = frozenset(
    method for method, permission in METHOD_PERMISSIONS.items() if permission is Permission.READ
)


def require_permission_rules(methods: Iterable[str]) -> None:
    """Raises ConfigurationError naming those of `methods` that have no rule."""
    missing = sorted(set(methods) - METHOD_PERMISSIONS.keys() - UNAUTHENTICATED_METHODS)
    if missing:
        raise ConfigurationError(f"no permission rule for {', '.join(missing)}")
