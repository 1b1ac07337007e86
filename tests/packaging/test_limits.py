"""The comments of the protos name every limit, with the value that the code has."""

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet
from support.proto_comments import (
    descriptors,
    field_comments,
    method_comment,
    package_comment,
)

from chat_ticket_svc import server
from chat_ticket_svc.config import Settings
from chat_ticket_svc.limits import KIB, MIB, Limits, Quotas
from chat_ticket_svc.rpc import middleware, status
from chat_ticket_svc.services import (
    attachment_url_policy,
    change_feed_cursor,
    change_feed_events,
    metadata_json,
    paging,
    validate,
)
from chat_ticket_svc.store import drafts, messages, search, sessions

OPTIONS = dict(server.OPTIONS)
DEFAULTS = Limits()
QUOTAS = Quotas()
UNARY_SECONDS = Settings.model_fields["unary_timeout_seconds"].default
DRAFT_SECONDS = Settings.model_fields["draft_seconds"].default
HEARTBEAT_SECONDS = Settings.model_fields["watch_heartbeat_seconds"].default
WRITE_SECONDS = Settings.model_fields["stream_write_timeout_seconds"].default

# Each limit of a request that is a setting, with the field that it limits and how that says it.
SETTINGS = {
    "content_bytes": ("ChatMessage.content", f"at most {DEFAULTS.content_bytes // KIB} KiB"),
    "metadata_bytes": ("ChatMessage.metadata_json", f"{DEFAULTS.metadata_bytes // KIB} KiB"),
    "metadata_depth": ("ChatMessage.metadata_json", f"at most {DEFAULTS.metadata_depth} levels"),
    "attachments": ("ChatMessage.attachments", f"at most {DEFAULTS.attachments}"),
    "batch_messages": (
        "BatchCreateChatMessagesRequest.messages",
        f"1 to {DEFAULTS.batch_messages}, with at most {DEFAULTS.attachments} attachments",
    ),
    "file_url": ("ChatAttachment.file_url", f"at most {DEFAULTS.file_url:,} characters"),
    "file_name": ("ChatAttachment.file_name", f"at most {DEFAULTS.file_name} characters"),
    "file_type": ("ChatAttachment.file_type", f"at most {DEFAULTS.file_type} characters"),
    "title": ("Ticket.title", f"at most {DEFAULTS.title} characters"),
    "query": ("SearchChatMessagesRequest.query", f"at most {DEFAULTS.query:,} characters"),
}
CONSTANTS = [
    ("ChatMessage.metadata_json", f"{metadata_json.MAX_SCALE:,} digits"),
    ("WriteChatDraftRequest.Append.text", f"at most {DEFAULTS.content_bytes // KIB} KiB"),
    ("WriteChatDraftRequest.Finish.attachments", f"at most {DEFAULTS.attachments}"),
    ("ListChatDraftsResponse.drafts", f"at most {drafts.MAX_OPEN_DRAFTS}"),
    ("ChatMessage.language_code", f"at most {validate.MAX_LANGUAGE_CODE} characters"),
    ("ChatAttachment.file_url", "at most five redirects"),
    ("ChatSession.user_id", f"at most {validate.MAX_REFERENCE} characters"),
    ("ChatSession.title", f"at most {DEFAULTS.title} characters"),
    ("ChatSession.labels", f"at most {sessions.MAX_LABELS} pairs. A key has 1 to 63 characters"),
    ("ChatSession.labels", f"A value has at most {validate.MAX_LABEL_VALUE} characters"),
    ("ListChatSessionsRequest.labels", f"at most {validate.MAX_FILTER_LABELS} pairs"),
    ("WatchChatSessionsRequest.labels", f"at most {validate.MAX_FILTER_LABELS} pairs"),
    (
        "WatchChatSessionsRequest.cursor",
        f"At most {change_feed_cursor.MAX_CHARACTERS:,} characters",
    ),
    ("ListChatMessagesResponse.messages", f"at most {paging.MAX_STREAM_PAGE} and about 1 MiB"),
    (
        "SearchChatMessagesResponse.incomplete_results",
        f"up to {search.MAX_MESSAGES:,} messages, {search.MAX_BYTES // MIB} MiB of text or "
        f"{search.MAX_SESSIONS:,} sessions",
    ),
]
OF_THE_FEED = [
    f"A response has at most {change_feed_events.MAX_EVENTS} events and about 1 MiB",
    f"at least every {HEARTBEAT_SECONDS} seconds",
    f"read nothing for {WRITE_SECONDS} seconds",
]
OF_DRAFTS = [
    f"A writer must send something every {DRAFT_SECONDS} seconds",
    f"a session has at most {drafts.MAX_OPEN_DRAFTS} open drafts",
    f"a tenant has at most {QUOTAS.tenant_drafts} streams of WriteChatDraft",
    f"writes {QUOTAS.tenant_draft_bytes_per_second // MIB} MiB a second",
    f"all tenants together have {QUOTAS.drafts:,} and {QUOTAS.draft_bytes_per_second // MIB} MiB",
]
OF_ALL_METHODS = [
    "1 to 255 printable ASCII characters",
    f"A repeated filter has at most {validate.MAX_FILTER_VALUES} values",
    f"at most {validate.MAX_FILTER_VALUES} paths",
    f"A request has at most {OPTIONS['grpc.max_receive_message_length'] // MIB} MiB and its "
    f"metadata at most {OPTIONS['grpc.absolute_max_metadata_size'] // KIB} KiB",
    f"A unary response has at most {paging.MAX_RESPONSE_BYTES // MIB} MiB",
    f"0 means {validate.DEFAULT_PAGE_SIZE}, values over {validate.MAX_PAGE_SIZE:,} mean",
    f"A unary call without a deadline has {UNARY_SECONDS} seconds",
    f"request must arrive within {UNARY_SECONDS} seconds",
    f"not started when less than {middleware.MIN_WRITE_SECONDS * 1000:g} ms remain",
    f"about {OPTIONS['grpc.max_connection_age_ms'] // 60_000} minutes old",
    f"have {OPTIONS['grpc.max_connection_age_grace_ms'] // 1000} seconds to finish",
    f"at most {validate.MAX_VIOLATIONS} of them, in at most {status.MAX_BAD_REQUEST_BYTES:,} bytes",
]


@pytest.fixture(scope="module")
def protos(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    return descriptors(tmp_path_factory.mktemp("protos"))


def test_field_names_its_limit(protos: FileDescriptorSet) -> None:
    """Every limit that is a setting, and the others that a field has."""
    assert set(SETTINGS) == set(Limits.model_fields), "a new limit is named in a comment too"
    comments = {name: comment for name, _, comment in field_comments(protos)}
    for field, text in [*SETTINGS.values(), *CONSTANTS]:
        assert text in comments[field], field
    assert attachment_url_policy.MAX_REDIRECTS == 5
    assert messages.PAGE_BYTES == change_feed_events.MAX_RESPONSE_BYTES == MIB


def test_fields_of_a_kind_name_the_limit_of_their_kind(protos: FileDescriptorSet) -> None:
    """Masks, filters, pages, etags and tenants, in every message that has them."""
    met = set()
    for name, field, comment in field_comments(protos):
        limit = limit_of_kind(name, field)
        if limit:
            assert limit in comment, name
            met.add(limit)
    assert len(met) == 5


def limit_of_kind(name: str, field: FieldDescriptorProto) -> str:
    is_repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    if field.type_name == ".google.protobuf.FieldMask":
        return f"at most {validate.MAX_FILTER_VALUES} paths"
    if is_repeated and field.type == FieldDescriptorProto.TYPE_ENUM:
        return f"At most {validate.MAX_FILTER_VALUES} values"
    if field.name == "page_size":
        return f"0 means {validate.DEFAULT_PAGE_SIZE}, and values over {validate.MAX_PAGE_SIZE:,}"
    if field.name == "etag":
        return "at most 18 digits"
    return "1 to 255 characters" if field.name == "tenant_id" else ""


@pytest.mark.parametrize("text", OF_ALL_METHODS)
def test_package_names_the_limits_of_all_methods(protos: FileDescriptorSet, text: str) -> None:
    """With the values that the server has."""
    assert text in package_comment(protos)


@pytest.mark.parametrize("text", OF_DRAFTS)
def test_write_names_the_limits_of_drafts(protos: FileDescriptorSet, text: str) -> None:
    """Of one session, one tenant and one server process."""
    assert text in method_comment(protos, "WriteChatDraft")


@pytest.mark.parametrize("text", OF_THE_FEED)
def test_watch_names_the_limits_of_the_feed(protos: FileDescriptorSet, text: str) -> None:
    """With the values that the server has."""
    assert text in method_comment(protos, "WatchChatSessions")
