"""Chat sessions through the API."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import grpc.aio
import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.cluster import Cluster
from support.database import execute
from support.messages import sequences
from support.sessions import ACTIVE, ARCHIVED, RESOLVED, get_session, list_all_ids, set_status
from support.tickets import SOLVED, update_ticket

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import (
    CHAT_SESSION_ORDER_UPDATE_TIME,
    CreateChatSessionRequest,
    DeleteChatSessionRequest,
    ListChatSessionsRequest,
    UpdateChatSessionRequest,
)
from chat_ticket_svc.services.validate import MAX_UUID
from chat_ticket_svc.store import session_listing, ticket_listing

NIL = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def many_of_one_status(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """A database, and its tenant with 20,000 active sessions and closed tickets."""
    url = cluster.create()
    execute(
        url,
        "INSERT INTO chat_sessions (tenant_id, created_at, updated_at)"
        " SELECT 'large', time, time FROM generate_series(timestamptz '2026-01-01',"
        " '2026-01-01'::timestamptz + interval '19999 minutes', '1 minute') AS time",
        "INSERT INTO tickets (tenant_id, title, status, created_at)"
        " SELECT 'large', 't', 'closed', created_at FROM chat_sessions",
        "VACUUM ANALYZE",
    )
    yield url, "large"
    cluster.drop(url)


class TestCreate:
    async def test_new_session_is_active_and_empty(self, api: Api) -> None:
        """A session starts active, without a ticket, at revision 0, in the caller's tenant."""
        session = await api.session()
        assert (session.status, session.has_ticket) == (ACTIVE, False)
        assert (session.revision, session.etag) == (0, "0")
        assert session.tenant_id == api.tenant
        assert session.create_time == session.update_time
        assert await get_session(api, session.id) == session

    async def test_status_can_be_given(self, api: Api) -> None:
        """An import can create a session that is over."""
        assert (await api.session(status=ARCHIVED)).status == ARCHIVED

    async def test_repeat_with_the_same_id_returns_the_session_as_it_is(self, api: Api) -> None:
        """A repeat does not undo what happened in between."""
        session_id = an_id()
        await api.session(id=session_id)
        await set_status(api, session_id, RESOLVED)
        again = await api.session(id=session_id.upper())
        assert (again.id, again.status, again.revision) == (session_id, RESOLVED, 1)

    async def test_sixteen_concurrent_creates_of_one_id_make_one_session(self, api: Api) -> None:
        """Every one of them gets the same session."""
        session_id = an_id()
        sessions = await asyncio.gather(*(api.session(id=session_id) for _ in range(16)))
        assert all(session == sessions[0] for session in sessions)
        assert await list_all_ids(api, ListChatSessionsRequest()) == [session_id]

    async def test_two_tenants_can_choose_the_same_id(self, api: Api, other: Api) -> None:
        """An id reveals nothing about other tenants, not even that it exists."""
        session_id = an_id()
        mine = await api.session(id=session_id)
        theirs = await other.session(id=session_id, status=RESOLVED)
        assert (mine.tenant_id, theirs.tenant_id) == (api.tenant, other.tenant)
        assert (await get_session(api, session_id)).status == ACTIVE

    async def test_bad_fields_are_rejected_together(self, api: Api) -> None:
        """A malformed id and an unknown enum number are reported at once."""
        session = r.ChatSession(id="x", status=77)  # type: ignore[arg-type]
        with refused(StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT") as refusal:
            await api.sessions.CreateChatSession(CreateChatSessionRequest(session=session))
        assert refusal.fields == {
            "session.id": "not a UUID",
            "session.status": "unknown enum value 77",
        }


class TestGet:
    async def test_absent_and_foreign_session_get_the_same_error(
        self, api: Api, other: Api
    ) -> None:
        """Another tenant's session gets the same error as one that does not exist."""
        theirs = (await other.session()).id
        texts = []
        for session_id in (theirs, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND") as refusal:
                await get_session(api, session_id)
            info = refusal.details["ResourceInfo"]
            assert (info.resource_type, info.resource_name) == ("chat_session", session_id)
            texts.append(refusal.text.replace(session_id, "ID"))
        assert texts[0] == texts[1]

    @pytest.mark.parametrize(
        "bad",
        [
            "",
            "x",
            "{00000000-0000-0000-0000-000000000000}",
            "0" * 32,
            "é" * 36,
            f"{NIL}0",
            f"{NIL}\n",
            f" {NIL}",
        ],
    )
    async def test_malformed_id_is_rejected(self, api: Api, bad: str) -> None:
        """Only the text form of RFC 9562 is an id."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await get_session(api, bad)
        assert list(refusal.fields) == ["session_id"]


class TestUpdate:
    async def test_any_change_of_status_is_allowed(self, api: Api) -> None:
        """Sessions are resolved, archived and taken up again; each change is a revision."""
        session = await api.session()
        for revision, status in enumerate((RESOLVED, ARCHIVED, ACTIVE, ARCHIVED, RESOLVED), 1):
            changed = await set_status(api, session.id, status)
            assert (changed.status, changed.revision) == (status, revision)
            assert changed.update_time.ToNanoseconds() > session.update_time.ToNanoseconds()
            session = changed

    async def test_setting_the_same_status_changes_nothing(self, api: Api) -> None:
        """A no-op increments no revision and moves no time."""
        session = await api.session()
        assert await set_status(api, session.id, ACTIVE) == session

    async def test_stale_etag_is_aborted(self, api: Api) -> None:
        """Who read an older revision does not overwrite a newer one."""
        session = await api.session()
        await set_status(api, session.id, RESOLVED, etag=session.etag)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await set_status(api, session.id, ARCHIVED, etag=session.etag)
        assert "RetryInfo" not in refusal.details, "the same call never succeeds"
        assert (await get_session(api, session.id)).status == RESOLVED

    async def test_malformed_etag_is_rejected(self, api: Api) -> None:
        """What this service never handed out is no etag."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await set_status(api, session.id, RESOLVED, etag='W/"0"')
        assert list(refusal.fields) == ["session.etag"]

    @pytest.mark.parametrize("paths", [[], ["has_ticket"], ["status", "tenant_id"], ["*"]])
    async def test_mask_names_what_can_change(self, api: Api, paths: list[str]) -> None:
        """An empty mask, or one with other fields, is rejected, and nothing changes."""
        session = await api.session()
        request = UpdateChatSessionRequest(
            session=r.ChatSession(id=session.id, status=RESOLVED),
            update_mask=FieldMask(paths=paths),
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.sessions.UpdateChatSession(request)
        assert list(refusal.fields) == ["update_mask"]
        assert await get_session(api, session.id) == session

    @pytest.mark.parametrize("status", [0, 9])
    async def test_status_must_be_one(self, api: Api, status: int) -> None:
        """Unspecified and unknown numbers are not statuses."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await set_status(api, session.id, status)
        assert list(refusal.fields) == ["session.status"]

    async def test_absent_and_foreign_are_not_found(self, api: Api, other: Api) -> None:
        """Nobody changes another tenant's session."""
        theirs = await other.session()
        for session_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await set_status(api, session_id, RESOLVED)
        assert await get_session(other, theirs.id) == theirs


class TestDelete:
    async def delete(self, api: Api, session_id: str, etag: str = "") -> None:
        request = DeleteChatSessionRequest(session_id=session_id, etag=etag)
        await api.sessions.DeleteChatSession(request)

    async def test_large_session_is_deleted_however_long_it_takes(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """The deletion goes on when its caller's deadline has passed, and a repeat waits for it.

        No part of the session is gone before the whole. Its ticket protects it as any other.
        """
        api = await start_server(fresh_database, statement_timeout_ms=300)
        session = await api.session()
        await api.message(session.id)
        link = await api.escalate(session.id)
        execute(
            fresh_database,
            "UPDATE chat_sessions SET revision = 1000000",
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(1); RETURN OLD; END $$",
            "CREATE TRIGGER wait BEFORE DELETE ON chat_messages"
            " FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        with refused(StatusCode.FAILED_PRECONDITION, "SESSION_HAS_ACTIVE_TICKET"):
            await self.delete(api, session.id)
        await update_ticket(api, link.ticket_id, status=SOLVED)
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DeleteChatSession(
                DeleteChatSessionRequest(session_id=session.id),
                metadata=api.sessions._metadata,
                timeout=0.3,
            )
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        assert await sequences(api, session.id) == [1]
        await self.delete(api, session.id)
        with refused(StatusCode.NOT_FOUND):
            await get_session(api, session.id)

    async def test_deleted_session_is_gone(self, api: Api) -> None:
        """A repeat of the delete is NOT_FOUND."""
        session = await api.session()
        await self.delete(api, session.id, etag=session.etag)
        with refused(StatusCode.NOT_FOUND):
            await get_session(api, session.id)
        with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
            await self.delete(api, session.id)

    async def test_stale_etag_is_aborted(self, api: Api) -> None:
        """A session that moved on is not deleted by who has not seen it."""
        session = await api.session()
        await api.message(session.id)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await self.delete(api, session.id, etag=session.etag)
        assert (await get_session(api, session.id)).revision == 1

    async def test_foreign_session_stays(self, api: Api, other: Api) -> None:
        """Nobody deletes another tenant's session."""
        theirs = await other.session()
        with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
            await self.delete(api, theirs.id)
        assert await get_session(other, theirs.id) == theirs


class TestList:
    async def test_newest_first_in_pages_that_meet_each_once(self, api: Api, other: Api) -> None:
        """Pages continue where the last one ended, and have no sessions of other tenants."""
        ids = [(await api.session()).id for _ in range(7)]
        await other.session()
        assert await list_all_ids(api, ListChatSessionsRequest(page_size=3)) == ids[::-1]

    async def test_by_update_time(self, api: Api) -> None:
        """The session that changed last is the first."""
        first, second, third = [(await api.session()).id for _ in range(3)]
        await api.message(first)
        request = ListChatSessionsRequest(order_by=CHAT_SESSION_ORDER_UPDATE_TIME, page_size=1)
        assert await list_all_ids(api, request) == [first, third, second]

    async def test_filter_by_status_and_ticket(self, api: Api) -> None:
        """Filters combine with AND; several statuses with OR."""
        active = (await api.session()).id
        resolved = (await api.session(status=RESOLVED)).id
        archived = (await api.session(status=ARCHIVED)).id
        ticketed = (await api.session()).id
        await api.escalate(ticketed)
        for statuses, has_ticket, expected in (
            ([ACTIVE], None, [ticketed, active]),
            ([RESOLVED, ARCHIVED], None, [archived, resolved]),
            ([], True, [ticketed]),
            ([], False, [archived, resolved, active]),
            ([ACTIVE], False, [active]),
        ):
            request = ListChatSessionsRequest(statuses=statuses, has_ticket=has_ticket)
            assert await list_all_ids(api, request) == expected

    @pytest.mark.parametrize(
        ("statement", "statuses", "has_ticket"),
        [
            (session_listing.LIST_OF_KIND_BY_CREATE_TIME, ["archived"], None),
            (session_listing.LIST_OF_KIND_BY_UPDATE_TIME, ["archived", "resolved"], None),
            (session_listing.LIST_OF_KIND_BY_UPDATE_TIME, None, True),
            (ticket_listing.LIST_TICKETS_OF_STATUSES, ["pending", "open"], None),
        ],
        ids=["by create time", "by update time", "with a ticket", "tickets"],
    )
    def test_page_of_a_rare_status_reads_only_its_rows(
        self, many_of_one_status: tuple[str, str], statement: Any, statuses: Any, has_ticket: Any
    ) -> None:
        """However many others the tenant has: the plan has an index whose order begins with it."""
        database, tenant = many_of_one_status
        params = {
            **dict.fromkeys(session_listing.Filter._fields),
            "tenant_id": tenant,
            "statuses": statuses,
            "has_ticket": has_ticket,
            "external_ref": None,
            "limit": 51,
            "after_time": "infinity",
            "after_id": MAX_UUID,
        }
        with psycopg.connect(database) as connection:
            explain = f"EXPLAIN (ANALYZE, BUFFERS) {statement}"
            plan = "\n".join(line for (line,) in connection.execute(explain, params))  # type: ignore[call-overload]
        assert "Rows Removed by Filter" not in plan, plan
        assert int(re.findall(r"Buffers: shared hit=(\d+)", plan)[0]) < 50, plan

    async def test_time_ranges_include_their_start_and_not_their_end(self, api: Api) -> None:
        """A range is [start, end), by creation or by last change."""
        sessions = [await api.session() for _ in range(3)]
        times = [session.create_time for session in sessions]
        request = ListChatSessionsRequest(start_create_time=times[1], end_create_time=times[2])
        assert await list_all_ids(api, request) == [sessions[1].id]
        await api.message(sessions[0].id)
        changed = (await get_session(api, sessions[0].id)).update_time
        request = ListChatSessionsRequest(start_update_time=changed)
        assert await list_all_ids(api, request) == [sessions[0].id]
        request = ListChatSessionsRequest(end_update_time=changed)
        assert await list_all_ids(api, request) == [sessions[2].id, sessions[1].id]

    @pytest.mark.parametrize("nanos", [999_999_000, 999_999_900, 999_999_999])
    async def test_widest_times_are_no_limit(self, api: Api, nanos: int) -> None:
        """Programs send the first and the last time that they can express for no limit."""
        ids = [(await api.session()).id]
        first, last = Timestamp(seconds=-62_135_596_800), Timestamp(seconds=253_402_300_799)
        last.nanos = nanos
        for kind in ("create", "update"):
            for start, end, expected in ((first, last, ids), (last, last, []), (first, first, [])):
                filters = {f"start_{kind}_time": start, f"end_{kind}_time": end}
                assert await list_all_ids(api, ListChatSessionsRequest(**filters)) == expected

    async def test_range_is_exact_below_a_microsecond(self, api: Api) -> None:
        """A nanosecond after the creation is after it."""
        session = await api.session()
        later = Timestamp()
        later.FromNanoseconds(session.create_time.ToNanoseconds() + 1)
        assert await list_all_ids(api, ListChatSessionsRequest(start_create_time=later)) == []
        assert await list_all_ids(api, ListChatSessionsRequest(end_create_time=later)) == [
            session.id
        ]

    async def test_page_size_defaults_to_50_and_stops_at_1000(self, api: Api) -> None:
        """0 means 50, and more than 1,000 means 1,000."""
        for _ in range(51):
            await api.session()
        page = await api.sessions.ListChatSessions(ListChatSessionsRequest())
        assert len(page.sessions) == 50
        assert page.next_page_token
        page = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=2000))
        assert len(page.sessions) == 51
        assert not page.next_page_token

    async def test_bad_fields_are_rejected_together(self, api: Api) -> None:
        """All violations of a list request are reported together."""
        request = ListChatSessionsRequest(
            statuses=[0, 8],  # type: ignore[list-item]
            order_by=9,  # type: ignore[arg-type]
            start_create_time=Timestamp(seconds=10**12),
            end_create_time=Timestamp(nanos=-1),
            page_size=-1,
            page_token="x",
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.sessions.ListChatSessions(request)
        assert set(refusal.fields) == {
            "statuses[0]",
            "statuses[1]",
            "order_by",
            "start_create_time",
            "end_create_time",
            "page_size",
            "page_token",
        }

    async def test_token_is_bound_to_filters_order_and_tenant(self, api: Api, other: Api) -> None:
        """A token of another call, or another tenant's, is rejected."""
        for caller in (api, other):
            for _ in range(3):
                await caller.session()
        page = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=1))
        token = page.next_page_token
        follow_up = ListChatSessionsRequest(page_size=2, page_token=token)
        assert len((await api.sessions.ListChatSessions(follow_up)).sessions) == 2
        for caller, request in (
            (other, ListChatSessionsRequest(page_token=token)),
            (api, ListChatSessionsRequest(page_token=token, statuses=[ACTIVE])),
            (api, ListChatSessionsRequest(page_token=token, order_by=2)),
            (api, ListChatSessionsRequest(page_token=token[:-4])),
            (api, ListChatSessionsRequest(page_token=token + "é")),
        ):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await caller.sessions.ListChatSessions(request)
            assert list(refusal.fields) == ["page_token"]
