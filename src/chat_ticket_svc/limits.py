"""The limits of a request, and the quotas of callers: groups of settings (see config.py)."""

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

# The default rate of a tenant: a small part of what a core serves, so that other tenants hardly
# notice a flood (`make bench PARTS=neighbour`). With more cores than these the rate stays the same,
# because a process does most of its work in one thread.
CALLS_PER_SECOND_AND_CORE = 200
MAX_CORES_OF_PROCESS = 8

KIB = 1024
MIB = 1024 * KIB


class Limits(BaseModel):
    """Limits of a request, in characters unless the name says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content_bytes: PositiveInt = Field(
        default=256 * KIB, description="Bytes of UTF-8 in the content of a message."
    )
    metadata_bytes: PositiveInt = Field(
        default=64 * KIB,
        description="Bytes of UTF-8 in the metadata of a message, without blanks between tokens.",
    )
    metadata_depth: PositiveInt = Field(
        default=20, description="How deep the metadata of a message may nest."
    )
    attachments: PositiveInt = Field(
        default=20, description="Attachments of a message, and of all messages of a batch together."
    )
    batch_messages: PositiveInt = Field(
        default=500, description="Messages in one `BatchCreateChatMessages`."
    )
    file_url: PositiveInt = Field(
        default=2048, description="Characters in the URL of an attachment."
    )
    file_name: PositiveInt = Field(
        default=255, description="Characters in the file name of an attachment."
    )
    file_type: PositiveInt = Field(
        default=255, description="Characters in the MIME type of an attachment."
    )
    title: PositiveInt = Field(
        default=500, description="Characters in the title of a ticket or a session."
    )
    query: PositiveInt = Field(default=1000, description="Characters in the query of a search.")


class Quotas(BaseModel):
    """Limits of what callers may use of one server process.

    Calls beyond the rate or the calls in flight wait for up to 2 seconds before they are refused.
    ListChatMessages, WatchChatSession, WatchChatSessions and WriteChatDraft count as streams.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant_calls_per_second: PositiveFloat | None = Field(
        default=None,
        description="Calls a second of one tenant, on average. Not set: "
        f"{CALLS_PER_SECOND_AND_CORE} for each core that the process has, at most "
        f"{CALLS_PER_SECOND_AND_CORE * MAX_CORES_OF_PROCESS}. Workers share the cores of a "
        "machine.",
    )
    tenant_burst: PositiveInt = Field(
        default=400, description="Calls that a tenant may make at once after a pause."
    )
    tenant_calls_in_flight: PositiveInt = Field(
        default=40, description="Unary calls of one tenant at the same time."
    )
    tenant_streams: PositiveInt = Field(default=1000, description="Open streams of one tenant.")
    session_streams: PositiveInt = Field(default=100, description="Open streams of one session.")
    calls_in_flight: PositiveInt = Field(
        default=400, description="Unary calls of all tenants at the same time."
    )
    streams: PositiveInt = Field(default=4000, description="Open streams of all tenants.")
    tenant_drafts: PositiveInt = Field(
        default=500, description="Drafts of one tenant that are being written."
    )
    drafts: PositiveInt = Field(
        default=2000, description="Drafts of all tenants that are being written."
    )
    tenant_draft_bytes_per_second: PositiveInt = Field(
        default=MIB,
        description="Bytes of text a second that one tenant writes to drafts; a piece counts as at "
        "least 128. Text beyond it waits.",
    )
    draft_bytes_per_second: PositiveInt = Field(
        default=8 * MIB,
        description="Bytes of text a second that all tenants write to drafts. Text beyond it "
        "waits.",
    )
