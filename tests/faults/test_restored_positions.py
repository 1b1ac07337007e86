"""Followers whose position a restore has lost are told, and no others are sent back.

All restores are of one moment, and other writes follow each. So revisions are given several
times.
"""

import copy
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from support.client import Api, an_id, refused
from support.cluster import Cluster
from support.messages import batches, create_batch, delete_message, set_metadata, user_message
from support.scratch_directory import scratch_directory
from support.server import serving
from support.sessions import RESOLVED, delete_session, set_status

from faults.followers import FeedFollower, SessionFollower
from faults.restores import WAYS, Backups, copied

TENANT = f"tenant {uuid.uuid4()}"

# Sessions, by what happens to them. All but the last are in the backup, with three messages.
QUIET = "never changes again"
LATER = "changes after the restore only"
AHEAD = "has changes that are lost, and others after the restore"
DELETED = "has a deletion that is lost"
YOUNG = "is lost, and created again after the restore"
IN_BACKUP = (QUIET, LATER, AHEAD, DELETED)
FOLLOWED = (QUIET, LATER, AHEAD, YOUNG)


@dataclass
class Followers:
    """At one moment of a history."""

    sessions: dict[str, SessionFollower] = field(default_factory=dict)
    feed: FeedFollower = field(default_factory=FeedFollower)

    async def catch_up(self, api: Api) -> None:
        for follower in (*self.sessions.values(), self.feed):
            await follower.catch_up(api)


@dataclass
class Original:
    """The backups, and followers of the original, which are not to change."""

    backups: Backups
    ids: dict[str, str] = field(default_factory=lambda: {name: an_id() for name in FOLLOWED})
    before: Followers = field(default_factory=Followers)  # the moment of the backups
    after: Followers = field(default_factory=Followers)


@pytest.fixture(scope="module")
async def original(migrated_data: Path) -> AsyncIterator[Original]:
    with scratch_directory() as directory:
        copied(migrated_data, directory / "primary")
        original = Original(Backups(directory))
        ids, backups = original.ids, original.backups
        ids[DELETED] = an_id()
        async with _served(backups.start()) as api:
            for name in IN_BACKUP:
                await api.session(id=ids[name])
                await _append(api, ids[name], "kept", 3)
        backups.stop()
        backups.take_snapshot()
        async with _served(backups.start()) as api:
            # So that recovery has something to replay.
            async with Api(api.address, "another tenant") as other:
                await other.session()
            original.before.sessions = {
                name: SessionFollower(ids[name]) for name in (QUIET, LATER, AHEAD)
            }
            await original.before.catch_up(api)
            backups.dump()
            await _write_what_is_lost(api, original)
            original.after = copy.deepcopy(original.before)
            original.after.sessions[YOUNG] = SessionFollower(ids[YOUNG])
            await original.after.catch_up(api)
        backups.archive()
        yield original
        backups.stop()


@asynccontextmanager
async def _served(database_url: str) -> AsyncIterator[Api]:
    async with serving(database_url) as server, Api(f"127.0.0.1:{server.port}", TENANT) as api:
        yield api


async def _append(api: Api, session_id: str, text: str, count: int) -> None:
    messages = [user_message(f"{text} {number}", id=an_id()) for number in range(count)]
    await create_batch(api, session_id, messages)


async def _write_what_is_lost(api: Api, original: Original) -> None:
    updated, deleted, _ = original.before.sessions[AHEAD].messages
    await set_metadata(api, updated, '{"lost": true}')
    await delete_message(api, deleted)
    await _append(api, original.ids[AHEAD], "lost", 2)
    await set_status(api, original.ids[AHEAD], RESOLVED)
    await api.session(id=original.ids[YOUNG])
    await _append(api, original.ids[YOUNG], "lost", 2)
    await api.escalate(original.ids[YOUNG])
    await delete_session(api, original.ids[DELETED])


async def _write_after(api: Api, original: Original, restore: str) -> None:
    await _append(api, original.ids[LATER], restore, 2)
    await _append(api, original.ids[AHEAD], restore, 6)
    await api.session(id=original.ids[YOUNG])
    await _append(api, original.ids[YOUNG], restore, 4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_two_restores_of_one_backup(
    original: Original,
    cluster: Cluster,
    way: Callable[[Backups, Cluster], AbstractContextManager[str]],
) -> None:
    """Positions of the original and of the first restore, before and after other writes."""
    # Where recovery ended is known. So it is also known that the feed before it is not lost.
    knows_branch = way is Backups.to_point_in_time
    first = Followers()
    lost = {LATER: (5, 3), AHEAD: (9, 3), YOUNG: None}  # of the positions in it
    for restore in ("first", "second"):
        with way(original.backups, cluster) as url:
            async with _served(url) as api:
                await _check(api, original.before, {}, feed=not knows_branch)
                await _check(api, original.after, {AHEAD: (8, 3), YOUNG: None}, feed=True)
                if first.sessions:
                    await _check(api, first, lost, feed=True)
                await _write_after(api, original, restore)
                await _check(api, original.before, {}, feed=not knows_branch)
                await _check(api, original.after, {AHEAD: (8, 3), YOUNG: (3, 0)}, feed=True)
                if first.sessions:
                    await _check(api, first, lost | {YOUNG: (4, 0)}, feed=True)
                first.sessions = {name: SessionFollower(original.ids[name]) for name in FOLLOWED}
                first.feed = FeedFollower()
                await first.catch_up(api)
                await _check(api, first, {}, feed=False)
    # Somebody thinks better of it.
    async with _served(original.backups.url) as api:
        await _check(api, first, lost | {YOUNG: (4, 0)}, feed=True)


async def _check(
    api: Api, followers: Followers, lost: dict[str, tuple[int, int] | None], *, feed: bool
) -> None:
    """Resume copies. `lost` has each position that is lost, and the last revision that is shared.

    None: the session itself is lost. `feed` says whether the follower of the feed is told.
    """
    resumed = copy.deepcopy(followers)
    for name, follower in resumed.sessions.items():
        expected = lost.get(name, ())
        if expected is None:
            with refused(grpc.StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await follower.catch_up(api)
            continue
        await _check_list(api, follower, expected)
        await follower.catch_up(api)
        losses = [(loss.revision, loss.shared) for loss in follower.losses]
        assert (name, losses) == (name, [expected] if expected else [])
        assert (name, follower.repeats) == (name, [])
        assert (name, await follower.differences(api)) == (name, [])
    await resumed.feed.catch_up(api)
    assert resumed.feed.losses == feed
    assert await resumed.feed.differences(api) == []


async def _check_list(
    api: Api, follower: SessionFollower, lost: tuple[()] | tuple[int, int]
) -> None:
    """A list that goes on at the same position is told the same."""
    place = {"after_sequence": follower.revision, "epoch": follower.epoch}
    if not lost:
        await batches(api, follower.session_id, **place)
        return
    with refused(grpc.StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED") as refusal:
        await batches(api, follower.session_id, **place)
    assert refusal.info.metadata["revision"] == str(lost[1])


@pytest.mark.parametrize("recovers_again", [False, True], ids=["crash", "another recovery"])
async def test_what_is_replayed_later_hides_no_loss(
    original: Original, cluster: Cluster, recovers_again: bool
) -> None:
    """PostgreSQL tells how far it has replayed last. The epoch may have ended long before."""
    with original.backups.to_point_in_time(cluster) as url:
        restored = original.backups.restored
        restored.write_elsewhere()
        restored.crash()
        if recovers_again:
            restored.recover()
        else:
            restored.start()
        async with _served(url) as api:
            resumed = copy.deepcopy(original.after.feed)
            await resumed.catch_up(api)
            assert resumed.losses == 1
            assert await resumed.differences(api) == []
