"""Messages that expect a revision of their session, in the group commit and beside it."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError
from support.client import Api, an_id, refused
from support.database import terminate_at_commit, wait_until_blocked
from support.drafts import list_drafts, start_finished, write_message, writing
from support.lost_answers import lose_first_answer
from support.messages import (
    delete_message,
    get_message,
    merge_metadata,
    sequences,
    set_metadata,
)
from support.sessions import get_revision
from support.tickets import unlink

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.store import append, drafts, group_commit, messages, tickets


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The contents of the messages that were appended in a statement of their own."""
    contents: list[str] = []
    append_messages = append.append_messages

    async def recorded(db: Any, tenant_id: str, session_id: str, new: Any, **options: Any) -> Any:
        contents.extend(message.content for message in new)
        return await append_messages(db, tenant_id, session_id, new, **options)

    monkeypatch.setattr(append, "append_messages", recorded)
    return contents


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The contents of each shared statement; none goes before a moment has passed."""
    batches: list[list[str]] = []
    write = group_commit.GroupCommitWriter._write_batch

    async def gathered(self: Any, batch: Any) -> None:
        batches.append([pending.message.content for pending in batch])
        await write(self, batch)
        await asyncio.sleep(0.05)

    monkeypatch.setattr(group_commit.GroupCommitWriter, "_write_batch", gathered)
    return batches


def count_mismatches(answers: list[Any]) -> int:
    """How many of the answers are mismatches. All others must be messages."""
    errors = [answer for answer in answers if not isinstance(answer, r.ChatMessage)]
    for error in errors:
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            raise error
        assert int(refusal.info.metadata["revision"]) > 0
    return len(errors)


class TestRaces:
    async def test_one_of_many_wins(self, two_clients: tuple[Api, Api]) -> None:
        """Through two servers, each round anew."""
        session = await two_clients[0].session()
        for round_number in range(8):
            answers = await asyncio.gather(
                *(
                    api.message(session.id, f"{round_number} {n}", expected_revision=round_number)
                    for n in range(25)
                    for api in two_clients
                ),
                return_exceptions=True,
            )
            assert count_mismatches(answers) == 49
            assert await sequences(two_clients[0], session.id) == list(range(1, round_number + 2))

    async def test_beside_writers_without_expectation(self, two_clients: tuple[Api, Api]) -> None:
        """Nobody writes at a revision other than the expected one, and no write is lost."""
        session = await two_clients[0].session()

        async def write_at_the_end(api: Api, name: int) -> None:
            for n in range(10):
                while True:
                    revision = await get_revision(api, session.id)
                    try:
                        message = await api.message(
                            session.id, f"at the end {name} {n}", expected_revision=revision
                        )
                    except AioRpcError as error:
                        assert count_mismatches([error]) == 1
                        continue
                    assert message.sequence == revision + 1
                    break

        async def write_anywhere(api: Api, name: int) -> None:
            for n in range(50):
                await api.message(session.id, f"anywhere {name} {n}")
                await asyncio.sleep(0.005)

        await asyncio.gather(
            *(write_at_the_end(api, n) for n in range(4) for api in two_clients),
            *(write_anywhere(api, n) for n in range(2) for api in two_clients),
        )
        assert await sequences(two_clients[0], session.id) == list(range(1, 281))

    async def test_revision_of_the_row_that_is_locked(self, fresh_database: str) -> None:
        """Not that of the snapshot: the session changes between the snapshot and the lock."""
        statement = group_commit.APPEND_BATCH.replace(
            "(SELECT %(expected_revisions)s::bigint[])",
            "(SELECT %(expected_revisions)s::bigint[] FROM pg_advisory_lock(1))",
        )
        assert "pg_advisory_lock" in statement
        session_id = an_id()
        params = {
            "tenant_ids": ["t"],
            "session_ids": [session_id],
            "roles": ["user"],
            "contents": ["x"],
            "search_language": "simple",
            "language_codes": [None],
            "search_languages": [None],
            "metadatas": [None],
            "author_kinds": [None],
            "author_ids": [None],
        }
        with (
            psycopg.connect(fresh_database, autocommit=True) as writer,
            psycopg.connect(fresh_database, autocommit=True) as other,
            psycopg.connect(fresh_database, autocommit=True) as watch,
        ):
            other.execute(
                "INSERT INTO chat_sessions (tenant_id, id, status) VALUES ('t', %s, 'active')",
                [session_id],
            )
            for expected, moves in ((0, True), (1, True), (2, False)):
                other.execute("SELECT pg_advisory_lock(1)")
                messages = {**params, "ids": [an_id()], "expected_revisions": [expected]}
                appending = asyncio.create_task(
                    asyncio.to_thread(lambda: writer.execute(statement, messages).fetchall())
                )
                await asyncio.to_thread(wait_until_blocked, watch, writer)
                if moves:
                    other.execute("UPDATE chat_sessions SET revision = revision + 1")
                other.execute("SELECT pg_advisory_unlock(1)")
                assert bool(await appending) is not moves
                writer.execute("SELECT pg_advisory_unlock_all()")
            assert watch.execute("SELECT revision FROM chat_sessions").fetchone() == (3,)


class TestOthers:
    async def test_unmet_expectation_delays_no_other_message(
        self, api: Api, together: list[list[str]], alone: list[str]
    ) -> None:
        """Those of the same session are in shared statements, and only it is in one of its own."""
        session = await api.session()
        await api.message(session.id)
        answers = await asyncio.gather(
            *(
                api.message(session.id, f"{n}", expected_revision=0 if n % 5 == 1 else None)
                for n in range(20)
            ),
            return_exceptions=True,
        )
        assert count_mismatches(answers) == 4
        assert {*alone} == {"1", "6", "11", "16"}
        assert max(map(len, together)) > 8
        assert await sequences(api, session.id) == list(range(1, 18))

    async def test_expectations_of_different_sessions_share_a_statement(
        self, api: Api, together: list[list[str]], alone: list[str]
    ) -> None:
        """Each is compared with its own session."""
        ids = [(await api.session()).id for _ in range(12)]
        for session_id in ids[:6]:
            await api.message(session_id)
        together.clear()
        answers = await asyncio.gather(
            *(api.message(session_id, session_id, expected_revision=0) for session_id in ids),
            return_exceptions=True,
        )
        assert max(map(len, together)) > 8
        assert {*alone} == {*ids[:6]}
        assert count_mismatches(answers[:6]) == 6
        assert count_mismatches(answers[6:]) == 0

    async def test_messages_behind_an_expectation_wait_for_the_next_statement(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They keep their order. Another expectation of the same session is written alone."""
        session = await api.session()
        batches: list[list[str]] = []
        go = asyncio.Event()
        write = group_commit.GroupCommitWriter._write_batch

        async def blocked_write(self: Any, batch: Any) -> None:
            batches.append([pending.message.content for pending in batch])
            await go.wait()
            await write(self, batch)

        monkeypatch.setattr(group_commit.GroupCommitWriter, "_write_batch", blocked_write)
        calls = []
        for n, expected in enumerate([None, 1, None, 0, None]):
            calls.append(
                asyncio.ensure_future(api.message(session.id, f"{n}", expected_revision=expected))
            )
            await asyncio.sleep(0.1)
        go.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert count_mismatches([answers.pop(3)]) == 1
        assert [message.sequence for message in answers] == [1, 2, 3, 4]
        assert batches == [["0"], ["1"], ["2", "4"]]


@pytest.mark.parametrize("content", ["small", "x" * 10_000], ids=["group commit", "alone"])
class TestRepeat:
    async def test_repeat_returns_the_stored_message(self, api: Api, content: str) -> None:
        """Also at the same time, and when the session has moved on."""
        session = await api.session()
        call = {"id": an_id(), "expected_revision": 0}
        answers = await asyncio.gather(
            *(api.message(session.id, content, **call) for _ in range(8))
        )
        assert answers == [answers[0]] * 8
        await api.message(session.id)
        assert await api.message(session.id, content, **call) == answers[0]
        assert await sequences(api, session.id) == [1, 2]

    async def test_connection_lost_before_the_commit(
        self, start_server: Any, fresh_database: str, content: str
    ) -> None:
        """The message is written by the next attempt."""
        api = await start_server(fresh_database)
        session = await api.session()
        terminate_at_commit(fresh_database, "chat_messages", "INSERT", only_first=True)
        assert (await api.message(session.id, content, expected_revision=0)).sequence == 1
        assert await sequences(api, session.id) == [1]

    async def test_connection_lost_after_the_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, content: str
    ) -> None:
        """The call finds its own message, which is not taken for a mismatch."""
        session = await api.session()
        lost = lose_first_answer(
            monkeypatch, group_commit.APPEND_BATCH if content == "small" else append.APPEND
        )
        message = await api.message(session.id, content, expected_revision=0)
        assert lost
        assert message.sequence == 1
        assert await sequences(api, session.id) == [1]

    async def test_other_message_after_the_lost_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, content: str
    ) -> None:
        """The revision has moved on by then, and the call still finds its own message."""
        session = await api.session()

        async def write_another() -> None:
            # In a statement of its own: the shared one is not over.
            await api.message(session.id, "another" * 2000)

        lost = lose_first_answer(
            monkeypatch,
            group_commit.APPEND_BATCH if content == "small" else append.APPEND,
            then=write_another,
        )
        message = await api.message(session.id, content, expected_revision=0)
        assert lost
        assert message.sequence == 1
        assert await sequences(api, session.id) == [1, 2]


class TestUpdates:
    async def test_delete_after_a_lost_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A conditional delete that allows a missing message finds that it is gone."""
        session = await api.session()
        message = await api.message(session.id)
        lost = lose_first_answer(monkeypatch, "COMMIT", after=messages.DELETE)
        await delete_message(api, message.id, etag="1", expected_revision=1, allow_missing=True)
        assert lost
        assert await get_revision(api, session.id) == 2

    @pytest.mark.parametrize("change", ["set", "merge"])
    async def test_connection_lost_after_the_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        """An update with an expected revision finds its own change."""
        session = await api.session()
        message = await api.message(session.id)
        lost = lose_first_answer(monkeypatch, "COMMIT", after=messages.SET_METADATA)
        update = {"set": set_metadata, "merge": merge_metadata}[change]
        changed = await update(api, message.id, '{"a": 1}', expected_revision=1)
        assert lost
        assert (changed.metadata_json, changed.revision) == ('{"a": 1}', 2)
        assert await get_revision(api, session.id) == 2

    @pytest.mark.parametrize("change", ["set", "merge"])
    async def test_etag_after_a_lost_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        """An update with an etag cannot be told from a mismatch: its outcome is unknown."""
        session = await api.session()
        message = await api.message(session.id)
        lose_first_answer(monkeypatch, "COMMIT", after=messages.SET_METADATA)
        update = {"set": set_metadata, "merge": merge_metadata}[change]
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
            await update(api, message.id, '{"a": 1}', etag="1")
        assert "RetryInfo" not in refusal.details
        assert await get_revision(api, session.id) == 2

    async def test_other_change_after_the_lost_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A mismatch would say that nothing was changed, so the outcome is unknown."""
        session = await api.session()
        message = await api.message(session.id)

        async def change_too() -> None:
            await merge_metadata(api, message.id, '{"b": 1}')

        lose_first_answer(monkeypatch, "COMMIT", after=messages.SET_METADATA, then=change_too)
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
            await merge_metadata(api, message.id, '{"a": 1}', expected_revision=1)
        changed = await get_message(api, message.id)
        assert changed.metadata_json == '{"a": 1, "b": 1}'

    async def test_link_that_is_gone_after_the_lost_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was made, and its followers were told of it: the outcome is unknown."""
        session = await api.session()
        link_id = an_id()

        async def drop_link() -> None:
            await unlink(api, link_id)

        lose_first_answer(monkeypatch, "COMMIT", after=tickets.CREATE_CHAT_TICKET, then=drop_link)
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
            await api.escalate(session.id, chat_ticket_id=link_id, expected_revision=0)
        assert await get_revision(api, session.id) == 2


class TestDrafts:
    async def test_other_message_after_the_lost_begin(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The writer gets the draft that it has begun."""
        session = await api.session()

        async def write_another() -> None:
            await api.message(session.id)

        lost = lose_first_answer(monkeypatch, "COMMIT", after=drafts.BEGIN, then=write_another)
        async with writing(api, session.id, expected_revision=0, exclusive=True) as stream:
            assert lost
            assert stream.revision == 1
            assert [draft.id for draft in await list_drafts(api, session.id)] == [stream.draft_id]

    async def test_finished_after_it_was_looked_for(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By another stream of the same writer: then the message is returned."""
        session = await api.session()
        draft_id = an_id()
        start = {"expected_revision": 0, "exclusive": True}
        written: list[r.ChatMessage] = []

        begin_draft = drafts._begin

        async def begin_later(*arguments: Any, **options: Any) -> Any:
            monkeypatch.undo()
            written.append(await write_message(api, session.id, draft_id=draft_id, **start))
            async with writing(api, session.id):
                return await begin_draft(*arguments, **options)

        monkeypatch.setattr(drafts, "_begin", begin_later)
        assert await start_finished(api, session.id, draft_id, **start) == written[0]
