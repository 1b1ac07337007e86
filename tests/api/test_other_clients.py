"""The service through clients that are not ours: grpcurl, buf curl, and Node.

The first two know nothing but an address: they learn the API by server reflection. Node reads the
protos from source.
"""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc import status_pb2
from grpc import StatusCode
from support.client import an_id
from support.grpc_tools import (
    FILES,
    PROTOS,
    SECONDS,
    SERVICES,
    BufCurl,
    Grpcurl,
    Tool,
    responses,
    unpacked,
)
from support.process import ServerProcess, server_process
from support.tools import needs_grpcurl

from chat_ticket.v1 import resources_pb2 as r

ROOT = Path(__file__).parents[2]
NODE = ROOT / "tests" / "support" / "node"

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

EMOJI = "naïve 中文 👩‍👩‍👧‍👦 $HOME \"quoted\" 'twice'\n\ttab"


both_tools = pytest.mark.parametrize(
    "tool", [pytest.param(Grpcurl, marks=needs_grpcurl), BufCurl], indirect=True
)


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    """A server process for the tests of this file, without heartbeats."""
    with server_process(
        database,
        CHAT_TICKET_WATCH_HEARTBEAT_SECONDS="3600",
    ) as process:
        yield process


@pytest.fixture
def grpcurl(process: ServerProcess, tenant: str, environment: dict[str, str]) -> Grpcurl:
    return Grpcurl(process.address, tenant, environment)


@pytest.fixture
def buf(process: ServerProcess, tenant: str, environment: dict[str, str]) -> BufCurl:
    return BufCurl(process.address, tenant, environment)


@pytest.fixture
def tool(
    request: pytest.FixtureRequest,
    process: ServerProcess,
    tenant: str,
    environment: dict[str, str],
) -> Tool:
    """The client that the test is run with."""
    return request.param(process.address, tenant, environment)


def a_session(tool: Tool) -> str:
    """A new session's id."""
    [response] = tool.call("ChatSessionService/CreateChatSession", {})
    return response.session.id


def a_message(tool: Tool, session_id: str, **fields: object) -> r.ChatMessage:
    message = {"role": "CHAT_MESSAGE_ROLE_USER", "content": "hello", **fields}
    [response] = tool.call(
        "ChatMessageService/CreateChatMessage", {"session_id": session_id, "message": message}
    )
    return response.message


@both_tools
class TestCalls:
    """What both command-line clients do, by reflection alone."""

    def test_unary_call_with_unicode_and_large_numbers(self, tool: Tool) -> None:
        """What a shell user sends is stored and shown as it is."""
        session_id, message_id = an_id(), an_id()
        [created] = tool.call(
            "ChatSessionService/CreateChatSession", {"session": {"id": session_id}}
        )
        assert (created.session.id, created.session.tenant_id) == (session_id, tool.tenant)
        sent = a_message(
            tool,
            session_id,
            id=message_id,
            content=EMOJI,
            metadata_json='{"big": 9007199254740993}',
            attachments=[
                {
                    "file_url": "https://files.example/a.png",
                    "file_name": "文.png",
                    "file_type": "image/png",
                }
            ],
        )
        [got] = tool.call("ChatMessageService/GetChatMessage", {"message_id": message_id})
        assert got.message == sent
        assert (got.message.content, got.message.sequence) == (EMOJI, 1)
        assert got.message.metadata_json == '{"big": 9007199254740993}'
        assert [file.file_name for file in got.message.attachments] == ["文.png"]

    def test_list_stream_ends_by_itself(self, tool: Tool) -> None:
        """ListChatMessages prints every batch, the session in the first, and exits with 0."""
        session_id = a_session(tool)
        contents = [f"message {number}" for number in range(100)]
        messages = [{"role": "CHAT_MESSAGE_ROLE_USER", "content": text} for text in contents]
        tool.call(
            "ChatMessageService/BatchCreateChatMessages",
            {"session_id": session_id, "messages": messages},
        )
        batches = tool.call("ChatMessageService/ListChatMessages", {"session_id": session_id})
        assert len(batches) > 1
        assert [batch.HasField("session") for batch in batches] == [True] + [False] * (
            len(batches) - 1
        )
        listed = [message for batch in batches for message in batch.messages]
        assert [message.content for message in listed] == contents
        assert [message.sequence for message in listed] == list(range(1, 101))

    def test_watch_stream_delivers_history_then_changes(self, tool: Tool) -> None:
        """A follower in a terminal sees each change when it happens, and the session's end."""
        session_id = a_session(tool)
        a_message(tool, session_id, content="history")
        with tool.following("ChatSessionService/WatchChatSession", {"session_id": session_id}) as (
            process,
            events,
        ):

            def following(kind: str) -> Any:
                event = next(events)
                assert event.WhichOneof("event") == kind
                return event

            assert following("session").session.id == session_id
            [message] = following("messages_created").messages_created.messages
            assert message.content == "history"
            assert following("caught_up").revision == 1
            a_message(tool, session_id, content="live")
            event = following("messages_created")
            assert [message.content for message in event.messages_created.messages] == ["live"]
            assert event.revision == 2
            tool.call("ChatSessionService/DeleteChatSession", {"session_id": session_id})
            following("session_deleted")
            assert list(events) == []
            assert process.wait(SECONDS) == 0

    def test_watch_stream_ends_at_the_callers_deadline(self, tool: Tool) -> None:
        """A time limit of the tool ends a follow, after all it has shown."""
        session_id = a_session(tool)
        a_message(tool, session_id)
        method = "ChatSessionService/WatchChatSession"
        done = tool.run(*tool.command(method, {"session_id": session_id}, seconds=3))
        assert tool.refusal(done.returncode, done.stderr).code is StatusCode.DEADLINE_EXCEEDED
        events = list(responses(method, done.stdout.splitlines(keepends=True)))
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["session", "messages_created", "caught_up"]

    def test_malformed_fields_are_all_named(self, tool: Tool) -> None:
        """INVALID_ARGUMENT shows each field and what is wrong with it."""
        refused = tool.refused(
            "ChatSessionService/CreateChatSession", {"session": {"id": "x", "status": 77}}
        )
        assert refused.code is StatusCode.INVALID_ARGUMENT
        assert refused.details["ErrorInfo"]["reason"] == "INVALID_ARGUMENT"
        assert refused.details["ErrorInfo"]["domain"] == "chat-ticket-svc"
        assert {
            violation["field"]: violation["description"]
            for violation in refused.details["BadRequest"]["field_violations"]
        } == {"session.id": "not a UUID", "session.status": "unknown enum value 77"}

    def test_absent_entity_is_named(self, tool: Tool) -> None:
        """NOT_FOUND shows of what kind and which it is, also at the start of a stream."""
        session_id = an_id()
        for method in (
            "ChatSessionService/GetChatSession",
            "ChatSessionService/WatchChatSession",
            "ChatMessageService/ListChatMessages",
        ):
            refused = tool.refused(method, {"session_id": session_id})
            assert refused.code is StatusCode.NOT_FOUND
            assert refused.details["ErrorInfo"]["reason"] == "CHAT_SESSION_NOT_FOUND"
            resource = refused.details["ResourceInfo"]
            assert (resource["resource_type"], resource["resource_name"]) == (
                "chat_session",
                session_id,
            )

    def test_broken_rule_is_named(self, tool: Tool) -> None:
        """FAILED_PRECONDITION shows the rule: a session with an open ticket is not deleted."""
        session_id = a_session(tool)
        tool.call(
            "ChatTicketService/CreateChatTicket",
            {"session_id": session_id, "ticket": {"title": "help"}},
        )
        refused = tool.refused("ChatSessionService/DeleteChatSession", {"session_id": session_id})
        assert refused.code is StatusCode.FAILED_PRECONDITION
        assert refused.details["ErrorInfo"]["reason"] == "SESSION_HAS_ACTIVE_TICKET"
        [violation] = refused.details["PreconditionFailure"]["violations"]
        assert violation["type"] == "SESSION_HAS_ACTIVE_TICKET"

    def test_missing_tenant_is_unauthenticated(self, tool: Tool) -> None:
        """The error names the missing header."""
        tool.tenant = ""
        refused = tool.refused("ChatSessionService/CreateChatSession", {})
        assert refused.code is StatusCode.UNAUTHENTICATED
        assert "x-tenant-id" in refused.message
        assert refused.details["ErrorInfo"]["reason"] == "TENANT_REQUIRED"

    def test_unknown_field_is_rejected_by_the_tool(self, tool: Tool) -> None:
        """The tool knows the fields by reflection: it does not send a misspelt one."""
        method = "ChatSessionService/GetChatSession"
        done = tool.run(*tool.command(method, {"sesion_id": an_id()}, SECONDS))
        assert (done.returncode, done.stdout) == (1, "")
        assert "sesion_id" in done.stderr


@needs_grpcurl
class TestGrpcurl:
    def run(self, grpcurl: Grpcurl, *arguments: str) -> str:
        done = grpcurl.run("-plaintext", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_list_names_every_service_and_method(self, grpcurl: Grpcurl) -> None:
        """The services of the protos, health and reflection, and nothing else."""
        services = self.run(grpcurl, grpcurl.address, "list").split()
        assert services == sorted([*SERVICES, HEALTH, REFLECTION])
        for name, service in SERVICES.items():
            methods = self.run(grpcurl, grpcurl.address, "list", name).split()
            assert methods == sorted(f"{name}.{method.name}" for method in service.methods)

    def test_describe_shows_a_service_and_a_message(self, grpcurl: Grpcurl) -> None:
        """A shell user can look up how to call a method, and what is in a message."""
        service = self.run(
            grpcurl, grpcurl.address, "describe", "chat_ticket.v1.ChatSessionService"
        )
        assert (
            "rpc WatchChatSession ( .chat_ticket.v1.WatchChatSessionRequest )"
            " returns ( stream .chat_ticket.v1.WatchChatSessionResponse );"
        ) in service
        message = self.run(grpcurl, grpcurl.address, "describe", "chat_ticket.v1.ChatMessage")
        for field in (
            "int64 sequence = 3;",
            ".chat_ticket.v1.ChatMessageRole role = 5;",
            ".google.protobuf.Timestamp create_time = 8;",
            "repeated .chat_ticket.v1.ChatAttachment attachments = 9;",
        ):
            assert field in message

    def test_describe_shows_a_template_of_a_request(self, grpcurl: Grpcurl) -> None:
        """What to put after -d can be asked for."""
        text = self.run(
            grpcurl,
            "-msg-template",
            grpcurl.address,
            "describe",
            "chat_ticket.v1.CreateChatMessageRequest",
        )
        template = json.loads(text.partition("Message template:")[2])
        assert set(template) == {"session_id", "message"}
        assert set(template["message"]) >= {"id", "role", "content", "metadata_json"}

    def test_health_of_the_server_and_of_each_service(
        self, grpcurl: Grpcurl, process: ServerProcess
    ) -> None:
        """A probe can ask for all of it or for one service, without a tenant."""
        process.wait_for("serving")
        for name in ("", *SERVICES):
            request = json.dumps({"service": name})
            text = self.run(grpcurl, "-d", request, grpcurl.address, f"{HEALTH}/Check")
            assert json.loads(text) == {"status": "SERVING"}

    def test_health_of_an_unknown_service_is_not_found(self, grpcurl: Grpcurl) -> None:
        """A probe with a typo does not pass."""
        done = grpcurl.run(
            "-plaintext", "-d", '{"service": "typo"}', grpcurl.address, f"{HEALTH}/Check"
        )
        assert grpcurl.refusal(done.returncode, done.stderr).code is StatusCode.NOT_FOUND


class TestBufCurl:
    def test_list_names_every_service_and_method(self, buf: BufCurl) -> None:
        """The services of the protos, health and reflection, with their methods."""
        flags = ("curl", "--protocol", "grpc", "--http2-prior-knowledge")
        url = f"http://{buf.address}"
        services = buf.run(*flags, "--list-services", url)
        assert services.stdout.split() == sorted([*SERVICES, HEALTH, REFLECTION]), services.stderr
        methods = buf.run(*flags, "--list-methods", url)
        assert set(methods.stdout.split()) >= {
            f"{name}/{method.name}"
            for name, service in SERVICES.items()
            for method in service.methods
        }, methods.stderr


@pytest.fixture(scope="class")
def closed(database: str) -> Iterator[ServerProcess]:
    """A server process without reflection."""
    with server_process(database, CHAT_TICKET_REFLECTION="false") as process:
        yield process


class TestWithoutReflection:
    @needs_grpcurl
    def test_grpcurl_lists_nothing_and_calls_with_the_protos(
        self, closed: ServerProcess, tenant: str, environment: dict[str, str]
    ) -> None:
        """CHAT_TICKET_REFLECTION=false hides the API from who does not have its protos."""
        grpcurl = Grpcurl(closed.address, tenant, environment)
        listed = grpcurl.run("-plaintext", closed.address, "list")
        assert (listed.returncode, listed.stdout) == (1, "")
        assert "does not support the reflection API" in listed.stderr
        blind = grpcurl.run(*grpcurl.command("ChatSessionService/CreateChatSession", {}, SECONDS))
        assert (blind.returncode, blind.stdout) == (1, "")

        grpcurl.schema = ("-import-path", str(PROTOS))
        for file in FILES:
            grpcurl.schema += ("-proto", file.DESCRIPTOR.name)
        self.check_calls(grpcurl)

    def test_buf_lists_nothing_and_calls_with_the_protos(
        self, closed: ServerProcess, tenant: str, environment: dict[str, str]
    ) -> None:
        """The same with buf, which takes the folder."""
        buf = BufCurl(closed.address, tenant, environment)
        listed = buf.run(
            "curl", "--protocol", "grpc", "--list-services", f"http://{closed.address}"
        )
        assert (listed.returncode != 0, listed.stdout) == (True, "")
        assert "unimplemented" in listed.stderr.lower()

        buf.schema = ("--schema", str(PROTOS))
        self.check_calls(buf)

    def check_calls(self, tool: Tool) -> None:
        """A unary call, a stream and an error."""
        session_id = a_session(tool)
        message = a_message(tool, session_id, content=EMOJI)
        [batch] = tool.call("ChatMessageService/ListChatMessages", {"session_id": session_id})
        assert batch.session.id == session_id
        assert list(batch.messages) == [message]
        refused = tool.refused("ChatTicketService/GetTicket", {"ticket_id": "x"})
        assert refused.code is StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def saw(node: str, process: ServerProcess, environment: dict[str, str]) -> dict[str, Any]:
    """What client.mjs printed, for its own tenant."""
    tenant = f"node {an_id()}"
    done = subprocess.run(
        [node, NODE / "client.mjs", process.address, tenant],
        env=environment,
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return {"tenant": tenant, **json.loads(done.stdout)}


class TestNode:
    """@grpc/grpc-js and @grpc/proto-loader; node/client.mjs makes the calls."""

    def test_unary_calls_transmit_text_and_large_numbers(self, saw: dict[str, Any]) -> None:
        """Emoji, other scripts and numbers past 2^53 come back as they were sent."""
        session, sent, message = saw["session"], saw["sent"], saw["message"]
        assert session["tenant_id"] == saw["tenant"]
        assert (session["status"], session["revision"]) == ("CHAT_SESSION_STATUS_ACTIVE", "0")
        assert message["session_id"] == session["id"]
        for field in ("id", "role", "content", "metadata_json"):
            assert message[field] == sent[field]
        assert "9007199254740993" in message["metadata_json"]
        [file], [sent_file] = message["attachments"], sent["attachments"]
        assert sent_file.items() <= file.items()

    def test_list_stream_has_all_messages_in_order(self, saw: dict[str, Any]) -> None:
        """Several batches, the session in the first; sequences are exact, as text; a clean end."""
        batches = saw["list"]["responses"]
        assert saw["list"]["status"] == 0
        assert [batch["session"] is not None for batch in batches] == [True, False, False]
        messages = [message for batch in batches for message in batch["messages"]]
        assert messages[0] == saw["message"]
        assert [message["content"] for message in messages[1:]] == [
            f"answer {number}" for number in range(100)
        ]
        assert [message["sequence"] for message in messages] == [
            str(sequence) for sequence in range(1, 102)
        ]
        created = [(message["id"], message["sequence"]) for message in saw["created"]]
        assert [(message["id"], message["sequence"]) for message in messages[1:]] == created

    def test_watch_stream_delivers_history_then_changes(self, saw: dict[str, Any]) -> None:
        """History, caught up, a message written meanwhile, the session's end, and a clean end."""
        events = saw["watch"]["responses"]
        kinds = [event["event"] for event in events]
        caught_up = kinds.index("caught_up")
        assert kinds[0] == "session"
        assert set(kinds[1:caught_up]) == {"messages_created"}
        assert kinds[caught_up + 1 :] == ["messages_created", "session_deleted"]
        history = [
            message
            for event in events[1:caught_up]
            for message in event["messages_created"]["messages"]
        ]
        assert history == [
            message for batch in saw["list"]["responses"] for message in batch["messages"]
        ]
        assert events[caught_up]["revision"] == "101"
        [live] = events[caught_up + 1]["messages_created"]["messages"]
        assert (live["content"], live["sequence"]) == ("are you there? 👋", "102")
        assert saw["watch"]["status"] == 0

    def test_errors_have_their_details(self, saw: dict[str, Any]) -> None:
        """A code, a text, and a google.rpc.Status in the trailers."""
        malformed, absent = saw["refusals"]["malformed"], saw["refusals"]["absent"]
        details = self.check_details(malformed, StatusCode.INVALID_ARGUMENT)
        assert details["ErrorInfo"]["reason"] == "INVALID_ARGUMENT"
        fields = [violation["field"] for violation in details["BadRequest"]["field_violations"]]
        assert fields == ["session.id", "session.status"]
        details = self.check_details(absent, StatusCode.NOT_FOUND)
        assert details["ErrorInfo"]["reason"] == "CHAT_SESSION_NOT_FOUND"
        assert details["ResourceInfo"]["resource_name"] == saw["session"]["id"]

    def check_details(self, refusal: dict[str, Any], code: StatusCode) -> dict[str, dict[str, Any]]:
        """The details of an error by type name, if its rich status matches its code."""
        status = status_pb2.Status.FromString(base64.b64decode(refusal["details"]))
        assert refusal["code"] == status.code == code.value[0]
        assert refusal["text"] == status.message
        kinds = [(packed.TypeName().rpartition(".")[2], packed.value) for packed in status.details]
        return {kind: unpacked(kind, value) for kind, value in kinds}
