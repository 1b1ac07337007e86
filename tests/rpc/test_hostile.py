"""Hostile requests: values and bytes that no well-behaved client sends.

These tests send a fixed part of what `make fuzz` sends. tests/fuzz/requests.py draws the requests,
and tests/fuzz/run.py has the rules for answers. test_hostile_wire.py tests HTTP/2 below gRPC.
"""

import base64
from collections.abc import AsyncIterator

import grpc.aio
import pytest
import pytest_asyncio
from fuzz.requests import hostile_message
from fuzz.run import (
    CANARY,
    EXPECTED_CODES,
    OTHER_TENANT,
    OURS,
    STANDARD,
    Answer,
    Method,
    Report,
    bystander,
    call,
    list_everything,
    populate,
    run_batch,
    run_corners,
    violations,
)
from fuzz.values import OWN, SECRET, draw_examples
from fuzz.wire import hostile_bytes, varint
from google.protobuf import descriptor_pb2, struct_pb2, type_pb2, wrappers_pb2
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2
from support.client import Api, an_id, refused
from support.server import serving

from chat_ticket.v1.chat_message_pb2 import SearchChatMessagesRequest
from chat_ticket_svc.limits import MIB
from chat_ticket_svc.reasons import REASONS

SEED = 20261130
COUNT = 30


def of_ours(name: str) -> Method:
    return next(method for method in OURS if method.name == name)


@pytest_asyncio.fixture(scope="session")
async def address(database: str) -> AsyncIterator[str]:
    """A server with another tenant's data, which is as it was when all is done.

    The drafts of the other tenant are open to the end.
    """
    async with serving(database, draft_seconds=3600) as server:
        address = f"127.0.0.1:{server.port}"
        async with bystander(address):
            yield address


every_method = pytest.mark.parametrize(
    "method", [*OURS, *STANDARD], ids=lambda method: method.path.rpartition(".")[2]
)


class TestRequests:
    @every_method
    async def test_hostile_values(self, address: str, method: Method) -> None:
        """Whatever the fields hold, the answer is a documented one, and the caller's own.

        Some calls succeed: requests each rejected at its first field would test nothing.
        """
        report = Report()
        await run_batch(address, method, as_bytes=False, count=COUNT, seed=SEED, report=report)
        assert not report.findings, report.summary
        assert report.counts[method.name, "OK"] + report.counts[method.name, "left"]

    @pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
    async def test_corners(self, address: str, method: Method) -> None:
        """Values that have broken something before, one at a time in a valid request."""
        report = Report()
        await run_corners(address, method, report)
        assert not report.findings, report.summary

    @every_method
    async def test_bytes_that_are_no_message(self, address: str, method: Method) -> None:
        """Whatever the bytes are, the answer is a documented one, and the caller's own."""
        report = Report()
        await run_batch(address, method, as_bytes=True, count=COUNT, seed=SEED, report=report)
        assert not report.findings, report.summary

    async def test_every_service_of_the_server_is_fuzzed(self, address: str) -> None:
        """What reflection lists is what the tests above know."""
        async with Api(address, "any") as api:
            reflection = STANDARD[-1]
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            answer = await call(api, reflection, request.SerializeToString())
        listed = reflection_pb2.ServerReflectionResponse.FromString(answer.responses[0])
        names = {service.name for service in listed.list_services_response.service}
        assert names == {method.path.split("/")[1] for method in [*OURS, *STANDARD]}

    def test_expected_codes_are_documented(self) -> None:
        """No status passes here that docs/reference/errors.md does not name."""
        documented = {reason.status for reason in REASONS}
        assert {code.name for code in EXPECTED_CODES} <= {*documented, "OK"}


class TestFound:
    """What `make fuzz` has found, each in its smallest form."""

    @pytest.mark.parametrize("query", ["-" * 64, "- " * 64, "-" * 64 + "word"])
    async def test_query_of_negations(self, api: Api, query: str) -> None:
        """websearch_to_tsquery takes some thirty in a row: XX000, tsquery stack too small."""
        await api.messages.SearchChatMessages(SearchChatMessagesRequest(query=query))

    async def test_reflection_of_the_deepest_nesting(self, api: Api) -> None:
        """The answer repeats the request, and can be parsed nevertheless."""
        group, end = b"\x9b\x06", b"\x9c\x06"  # of the unknown field 99
        request = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
        request += group * 100 + end * 100
        reflection_pb2.ServerReflectionRequest.FromString(request)
        method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        call = api.channel.stream_stream(method)(iter([request]))
        response = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
        assert len(response.list_services_response.service) == 7


class TestLimits:
    """Sizes of whole requests, too large for each of many examples."""

    @pytest.mark.parametrize("off", [-1, 0])
    async def test_request_of_4_mib_is_read(self, address: str, off: int) -> None:
        """At the limit it is still the service that answers."""
        async with Api(address, "large") as api:
            request = _filled(4 * MIB + off)
            with refused(StatusCode.INVALID_ARGUMENT):
                await api.channel.unary_unary(of_ours("CreateChatMessage").path)(
                    request, metadata=api.sessions._metadata
                )

    @pytest.mark.parametrize("method", [*OURS, *STANDARD], ids=lambda method: method.name)
    async def test_request_over_4_mib_is_rejected(self, address: str, method: Method) -> None:
        """By gRPC itself, which cannot add our details; nothing of it is parsed."""
        async with Api(address, "large") as api:
            answer = await call(api, method, _filled(4 * MIB + 1))
        assert answer.code is StatusCode.RESOURCE_EXHAUSTED
        assert answer.text == "SERVER: Received message larger than max (4194305 vs. 4194304)"
        assert not violations(method, [_filled(4 * MIB + 1)], answer)


def _filled(size: int) -> bytes:
    """A message of this size: an unknown field, and nothing else."""
    length = size - len(varint(999 << 3 | 2)) - 4
    data = varint(999 << 3 | 2) + varint(length) + b"\0" * length
    assert len(data) == size
    return data


class TestStrategies:
    """The strategies draw what they should."""

    def test_any_message_can_be_drawn(self) -> None:
        """All kinds of fields: maps, messages in themselves, bytes, floats, closed enums."""
        for kind in (
            struct_pb2.Struct,
            type_pb2.Type,
            descriptor_pb2.FileDescriptorProto,
            wrappers_pb2.DoubleValue,
            wrappers_pb2.BytesValue,
            wrappers_pb2.UInt64Value,
        ):
            drawn = draw_examples(hostile_message(kind), 20, SEED)
            assert any(each.ByteSize() for each in drawn)
            for each in drawn:
                assert kind.FromString(each.SerializeToString()) is not None

    def test_same_seed_draws_the_same(self) -> None:
        """A failure can be sent again."""
        method = of_ours("SearchChatMessages")
        drawn = [
            draw_examples(hostile_bytes(method.request, "a", OTHER_TENANT), 50, seed)
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]


class TestJudgement:
    """The rules find violations."""

    METHOD = of_ours("ListTickets")

    @pytest.mark.parametrize(
        "secret",
        [
            CANARY.encode(),
            CANARY.upper().encode(),
            *[values[0].encode() for values in SECRET.values()],
        ],
    )
    @pytest.mark.parametrize("where", ["response", "trailer", "text", "page token"])
    async def test_byte_of_another_tenant_is_found(self, secret: bytes, where: str) -> None:
        """In any part of the answer, in upper and lower case."""
        answer = Answer(StatusCode.OK, [])
        match where:
            case "response":
                answer.responses = [self.METHOD.response().SerializeToString() + b"\x12" + secret]
            case "trailer":
                answer.metadata = [("x-bin", b"\0" + secret)]
            case "text":
                answer.text = f"no {secret.decode()}"
            case "page token":
                token = base64.urlsafe_b64encode(b'["' + secret + b'"]').decode().rstrip("=")
                answer.responses = [self.METHOD.response(next_page_token=token).SerializeToString()]
        assert any("tells" in each for each in violations(self.METHOD, [b""], answer))

    @pytest.mark.parametrize(
        ("code", "found"),
        [
            (StatusCode.INTERNAL, "INTERNAL: said"),
            (StatusCode.UNKNOWN, "UNKNOWN: said"),
            (StatusCode.CANCELLED, "CANCELLED: said"),
            (StatusCode.UNAVAILABLE, "UNAVAILABLE: said"),
            (StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED: said"),
            (StatusCode.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED: said"),
            (StatusCode.NOT_FOUND, "without proper details"),
        ],
    )
    def test_undocumented_status_is_found(self, code: StatusCode, found: str) -> None:
        """And a documented one without its details."""
        error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "said")
        answer = Answer(code, [], [], "said", error)
        [violation] = violations(self.METHOD, [b""], answer)
        assert found in violation

    async def test_change_to_another_tenant_is_found(self, address: str) -> None:
        """The data of the other tenant is compared, not only the answers."""
        ids = {kind: [an_id() for _ in values] for kind, values in OWN.items()}
        async with Api(address, f"tenant {an_id()}") as api:
            await populate(api, ids, "x")
            before = await list_everything(api)
            assert await list_everything(api) == before
            await api.message(ids["session"][0])
            assert await list_everything(api) != before
