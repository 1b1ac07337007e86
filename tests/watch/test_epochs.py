"""The epoch of a position in WatchChatSession: true, or lost with the history it belongs to."""

from collections.abc import AsyncIterator

import psycopg
import pytest
import pytest_asyncio
from grpc import StatusCode
from support.client import Api, refused
from support.messages import set_metadata
from support.restores import begin_epoch, restore, restoring
from support.server import Server, serving
from support.sessions import RESOLVED, get_session, set_status
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.store import epochs

A, B, C = (digit * 16 for digit in "abc")


@pytest_asyncio.fixture(scope="module")
async def polling_server(database: str) -> AsyncIterator[Server]:
    async with serving(database, watch_poll_interval_seconds=0.1) as server:
        yield server


@pytest_asyncio.fixture
async def api(polling_server: Server, tenant: str) -> AsyncIterator[Api]:
    async with Api(f"127.0.0.1:{polling_server.port}", tenant) as api:
        yield api


async def session_at(api: Api, revision: int) -> r.ChatSession:
    """A session of as many messages."""
    session = await api.session()
    return await grow(api, session.id, revision)


async def grow(api: Api, session_id: str, count: int) -> r.ChatSession:
    for _ in range(count):
        await api.message(session_id)
    return await get_session(api, session_id)


async def expect_lost(api: Api, position: r.ChatSession, shared: int) -> None:
    """Both histories share `shared` revisions, and a watch goes on there."""
    current = await get_session(api, position.id)
    with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED") as refusal:
        await catch_up(api, position)
    assert refusal.info.metadata == {"revision": str(shared), "epoch": current.epoch}
    position = r.ChatSession(id=position.id, revision=shared, epoch=current.epoch)
    assert await catch_up(api, position) == list(range(shared + 1, current.revision + 1))


async def catch_up(api: Api, position: r.ChatSession) -> list[int]:
    """Watch after a position, and return the sequences of the messages up to `caught_up`."""
    async with watching(api, position.id, after=position.revision, epoch=position.epoch) as watcher:
        await watcher.until("caught_up")
    return watcher.created


class TestSharedRevision:
    @pytest.mark.parametrize(
        ("position", "current", "shared"),
        [
            ((f"0.{A}", 5), (f"0.{A}", 7), 5),
            ((f"0.{A}", 5), (f"0.{A}", 3), 3),
            # The session has changed in a later epoch: after the position, or before it.
            ((f"0.{A}", 5), (f"0.{A}-6.{B}", 9), 5),
            ((f"0.{A}", 5), (f"0.{A}-5.{B}", 9), 4),
            ((f"0.{A}", 5), (f"0.{A}-3.{B}-8.{C}", 9), 2),
            ((f"0.{A}-3.{B}", 5), (f"0.{A}-3.{B}-6.{C}", 9), 5),
            ((f"0.{A}-3.{B}", 5), (f"0.{A}-3.{B}-4.{C}", 9), 3),
            # The position is of an epoch that the session has lost.
            ((f"0.{A}-3.{B}", 5), (f"0.{A}", 9), 2),
            ((f"0.{A}-6.{B}", 5), (f"0.{A}", 9), 5),
            ((f"0.{A}-3.{B}", 5), (f"0.{A}-4.{C}", 9), 2),
            ((f"0.{A}-4.{B}", 5), (f"0.{A}-3.{C}", 9), 2),
            # The same epoch, in which the session was different: it was restored a second time.
            ((f"0.{A}-3.{B}", 5), (f"0.{A}-4.{B}", 9), 2),
            # Another session.
            ((f"0.{A}", 5), (f"0.{B}", 9), -1),
            ((f"0.{A}-3.{B}", 5), (f"0.{B}", 9), -1),
        ],
    )
    def test_last_revision_of_both(
        self, position: tuple[str, int], current: tuple[str, int], shared: int
    ) -> None:
        """What the current history has of the other one, up to the position."""
        assert epochs.shared_revision(*position, *current) == shared
        assert epochs.PATTERN.fullmatch(position[0])


class TestResume:
    async def test_position_that_is_still_true(self, api: Api, database: str) -> None:
        """A new epoch refuses nobody who has lost nothing, before its first change or after it."""
        position = await session_at(api, 3)
        begin_epoch(database)
        assert await catch_up(api, position) == []
        changed = await grow(api, position.id, 1)
        assert changed.epoch != position.epoch
        assert await catch_up(api, position) == [4]
        assert await catch_up(api, changed) == []

    async def test_position_beyond_what_was_restored(self, api: Api, database: str) -> None:
        """It is refused although the session has not changed since."""
        backup = await session_at(api, 2)
        lost = await grow(api, backup.id, 2)
        restore(database, backup)
        await expect_lost(api, lost, shared=2)
        assert await catch_up(api, backup) == []

    async def test_revision_that_was_taken_twice(self, api: Api, database: str) -> None:
        """It is refused with its epoch. Without one it is not, as nobody can tell."""
        backup = await session_at(api, 2)
        lost = await grow(api, backup.id, 2)
        restore(database, backup)
        changed = await grow(api, backup.id, 3)
        await expect_lost(api, lost, shared=2)
        assert await catch_up(api, backup) == [3, 4, 5]
        assert await catch_up(api, changed) == []
        lost.epoch = ""
        assert await catch_up(api, lost) == [5]

    async def test_two_restores_in_a_row(self, api: Api, database: str) -> None:
        """Each position is refused exactly as far as it was lost in one of them."""
        first = await session_at(api, 2)
        lost_first = await grow(api, first.id, 3)
        restore(database, first)
        second = await grow(api, first.id, 1)
        lost_second = await grow(api, first.id, 2)
        restore(database, second)
        await grow(api, first.id, 4)
        await expect_lost(api, lost_first, shared=2)
        await expect_lost(api, lost_second, shared=3)
        assert await catch_up(api, first) == [3, 4, 5, 6, 7]
        assert await catch_up(api, second) == [4, 5, 6, 7]

    async def test_epoch_that_nobody_knows(self, api: Api) -> None:
        """A branch that the session does not have is lost from where it began."""
        session = await session_at(api, 3)
        branch = r.ChatSession(id=session.id, revision=3, epoch=f"{session.epoch}-2.{A}")
        await expect_lost(api, branch, shared=1)
        stranger = r.ChatSession(id=session.id, revision=3, epoch=f"0.{A}")
        await expect_lost(api, stranger, shared=0)
        stranger.revision = 0
        assert await catch_up(api, stranger) == [1, 2, 3]

    async def test_session_that_was_lost_and_created_again(self, api: Api, database: str) -> None:
        """Nothing is shared: a watch goes on from revision 0."""
        lost = await session_at(api, 1)
        await self._create_again(api, database, lost)
        await grow(api, lost.id, 2)
        await expect_lost(api, lost, shared=0)

    async def test_session_that_is_created_again_during_a_watch(
        self, api: Api, database: str
    ) -> None:
        """The stream ends as one that resumes, not as one whose session was deleted."""
        lost = await session_at(api, 0)
        async with watching(api, lost.id, epoch=lost.epoch) as watcher:
            await watcher.until("caught_up")
            await self._create_again(api, database, lost)
            with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED") as refusal:
                await watcher.next()
            assert refusal.info.metadata["revision"] == "0"

    async def _create_again(self, api: Api, database: str, lost: r.ChatSession) -> None:
        with psycopg.connect(database) as connection:
            for table in ("chat_sessions", "chat_session_tombstones"):
                connection.execute(f"DELETE FROM {table} WHERE tenant_id = %s", [api.tenant])  # type: ignore[arg-type]
            connection.execute("SELECT begin_chat_epoch()")
            connection.execute(
                "INSERT INTO chat_sessions (tenant_id, id) VALUES (%s, %s)", [api.tenant, lost.id]
            )

    @pytest.mark.parametrize(
        ("epoch", "description"),
        [
            ("x", "not an epoch of this service"),
            (f"0.{A}-", "not an epoch of this service"),
            (f"0.{A}\n", "not an epoch of this service"),
            ("-".join([f"0.{A}"] * 432), "8,207 characters, at most 8,192"),
        ],
    )
    async def test_text_that_is_no_epoch(self, api: Api, epoch: str, description: str) -> None:
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await catch_up(api, r.ChatSession(id=session.id, epoch=epoch))
        assert refusal.fields == {"epoch": description}


class TestPositionBetweenChanges:
    """A message that changes twice is told once, at the second change."""

    async def test_it_is_lost_with_a_later_change(self, api: Api, database: str) -> None:
        """The first one is not lost, but was never told. The caller goes back to before it."""
        backup, between = await self._between_changes(api)
        restore(database, backup)
        with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED") as refusal:
            await catch_up(api, between)
        assert refusal.info.metadata == {"revision": "1", "epoch": backup.epoch}

    async def test_it_is_true_while_nothing_is_lost(self, api: Api, database: str) -> None:
        """Also in a new epoch, and so is that of the last change."""
        _, between = await self._between_changes(api)
        begin_epoch(database)
        await api.message(between.id)
        async with watching(api, between.id, after=3, epoch=between.epoch) as watcher:
            watcher.messages = dict.fromkeys([self.first], r.ChatMessage())
            assert "--" in (await watcher.next()).epoch
            await watcher.until("caught_up")
            current = await get_session(api, between.id)
            assert (watcher.created, watcher.epoch) == ([5], current.epoch)

    async def _between_changes(self, api: Api) -> tuple[r.ChatSession, r.ChatSession]:
        """A session before its last change, and what a watch after revision 1 is told before it."""
        session = await api.session()
        self.first = (await api.message(session.id)).id
        await set_metadata(api, self.first, '{"at": 2}')
        await api.message(session.id)
        backup = await get_session(api, session.id)
        await set_metadata(api, self.first, '{"at": 4}')
        async with watching(api, session.id, after=1, epoch=session.epoch) as watcher:
            assert (await watcher.next()).epoch == backup.epoch
            event = await watcher.next()
        assert [message.sequence for message in event.messages_created.messages] == [3]
        return backup, r.ChatSession(id=session.id, revision=event.revision, epoch=event.epoch)


class TestOpenStream:
    @pytest.mark.parametrize("include_drafts", [False, True], ids=["", "drafts"])
    @pytest.mark.parametrize("sends_epoch", [False, True], ids=["no epoch", "epoch"])
    async def test_same_revision_of_another_history(
        self, api: Api, database: str, sends_epoch: bool, include_drafts: bool
    ) -> None:
        """The stream ends: the poll compares the epochs too."""
        backup = await session_at(api, 2)
        lost = await grow(api, backup.id, 1)
        async with watching(
            api,
            lost.id,
            after=lost.revision,
            epoch=lost.epoch if sends_epoch else "",
            include_drafts=include_drafts,
        ) as watcher:
            await watcher.until("caught_up")
            with restoring(database, backup) as connection:
                connection.execute(
                    "UPDATE chat_sessions SET revision = revision + 1 WHERE tenant_id = %s",
                    [api.tenant],
                )
            reason = "HISTORY_CHANGED" if sends_epoch else "REVISION_OUT_OF_RANGE"
            with refused(StatusCode.OUT_OF_RANGE, reason) as refusal:
                await watcher.next()
        current = await get_session(api, lost.id)
        assert current.revision == lost.revision
        if sends_epoch:
            assert refusal.info.metadata == {"revision": "2", "epoch": current.epoch}

    async def test_new_epoch_that_lost_nothing(self, api: Api, database: str) -> None:
        """The stream goes on, and its positions have the new epoch from the first change on."""
        session = await session_at(api, 1)
        async with watching(api, session.id, after=1, epoch=session.epoch) as watcher:
            await watcher.until("caught_up")
            begin_epoch(database)
            changed = await set_status(api, session.id, RESOLVED)
            await watcher.until_revision(2)
            assert session.epoch != watcher.epoch == changed.epoch

    async def test_watchers_of_two_histories_share_no_page(self, api: Api, database: str) -> None:
        """At the same revision, one has lost its position and the other gets what follows."""
        backup = await session_at(api, 2)
        lost = await grow(api, backup.id, 1)
        async with watching(api, lost.id, after=3, epoch=lost.epoch) as old:
            await old.until("caught_up")
            with restoring(database, backup) as connection:
                connection.execute(
                    "UPDATE chat_sessions SET revision = revision + 1 WHERE tenant_id = %s",
                    [api.tenant],
                )
            async with watching(api, lost.id, after=3) as new:
                await new.until("caught_up")
                await api.message(lost.id)
                await new.until_revision(4)
                assert new.created == [4]
                with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED"):
                    await old.next()


class TestLineage:
    async def test_first_change_in_an_epoch_is_kept(self, api: Api, database: str) -> None:
        """One entry for each epoch with changes, whoever makes them."""
        session = await session_at(api, 2)
        [begun] = session.epoch.split("-")
        begin_epoch(database)
        begin_epoch(database)  # in which nothing changes
        assert (await get_session(api, session.id)).epoch == begun
        second = await grow(api, session.id, 3)
        with psycopg.connect(database) as connection:
            newest = "SELECT id FROM chat_epochs ORDER BY ordinal DESC LIMIT 1"
            [current] = connection.execute(newest).fetchone() or ("",)
            assert second.epoch == f"{begun}-3.{current}"
            connection.execute("SELECT begin_chat_epoch()")
            # As a server of an older release does it.
            [third] = connection.execute(
                "UPDATE chat_sessions SET revision = revision + 1 WHERE tenant_id = %s"
                " RETURNING epoch",
                [api.tenant],
            ).fetchone() or ("",)
            [current] = connection.execute(newest).fetchone() or ("",)
        assert third == f"{second.epoch}-6.{current}"
        assert (await api.session()).epoch == f"0.{current}"
