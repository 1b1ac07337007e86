"""The user, the title and the labels of a session through the API."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.sessions import RESOLVED, get_session, update_session

KEY_RULE = "the key is not 1 to 63 characters of a-z, 0-9 and ._/-"
CONTROL = "contains a control character or a line break"
LABELS = {"plan": "gold", "region": "eu"}
# One of every character that a key may have.
KEYS = ["a.b/c_d-e", ".", "/", "_", "-", "0", "z" * 63]


class TestCreate:
    async def test_user_title_and_labels_are_stored_as_sent(self, api: Api) -> None:
        """In any language, and up to the limits."""
        labels = {key: f"Größe {key} 日本" for key in KEYS} | {"empty": "", "long": "ü" * 255}
        sent: dict[str, Any] = {"user_id": "Jürgen@例え.jp" + "é" * 243, "title": "題" * 500}
        session = await api.session(**sent, labels=labels)
        assert (session.user_id, session.title) == (sent["user_id"], sent["title"])
        assert dict(session.labels) == labels
        assert await get_session(api, session.id) == session

    async def test_thirty_two_labels_fit(self, api: Api) -> None:
        """The most that a session can have."""
        labels = {f"key-{n}": str(n) for n in range(32)}
        assert dict((await api.session(labels=labels)).labels) == labels

    async def test_session_without_them_has_none(self, api: Api) -> None:
        """All three are optional."""
        session = await api.session()
        assert (session.user_id, session.title, dict(session.labels)) == ("", "", {})

    async def test_violations_are_reported_together(self, api: Api) -> None:
        """Of each field, and of each label by its key."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.session(
                user_id="u" * 256,
                title=" x",
                labels={
                    "": "",
                    "Upper": "",
                    "k" * 64: "",
                    "lines": "a\nb",
                    "long": "v" * 256,
                    "nul": "\0",
                    "separator": "\u2028",
                    "good": "yes",
                },
            )
        assert refusal.fields == {
            "session.user_id": "256 characters, at most 255",
            "session.title": "begins or ends with a blank",
            "session.labels[]": KEY_RULE,
            "session.labels[Upper]": KEY_RULE,
            f"session.labels[{'k' * 64}]": KEY_RULE,
            "session.labels[lines]": CONTROL,
            "session.labels[long]": "256 characters, at most 255",
            "session.labels[nul]": "contains a NUL character",
            "session.labels[separator]": CONTROL,
        }

    async def test_more_labels_are_rejected(self, api: Api) -> None:
        """Before any of them is looked at."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.session(labels={f"KEY {n}": "" for n in range(33)})
        assert refusal.fields == {"session.labels": "33 elements, at most 32"}

    async def test_repeat_returns_the_session_whatever_its_title_and_labels(self, api: Api) -> None:
        """They may have changed since."""
        session_id = an_id()
        await api.session(id=session_id, user_id="ann", title="old", labels=LABELS)
        changed = await update_session(api, session_id, "title", "labels", title="new")
        again = await api.session(id=session_id, user_id="ann", title="old", labels=LABELS)
        assert again == changed

    @pytest.mark.parametrize(("first", "second"), [("ann", "bob"), ("ann", ""), ("", "bob")])
    async def test_repeat_for_another_user_is_rejected(
        self, api: Api, first: str, second: str
    ) -> None:
        """An id that another user's session has. The session stays as it is."""
        session = await api.session(id=an_id(), user_id=first)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_SESSION_ALREADY_EXISTS") as refusal:
            await api.session(id=session.id, user_id=second)
        assert refusal.details["ResourceInfo"].resource_name == session.id
        assert await get_session(api, session.id) == session


class TestUpdate:
    async def test_one_call_is_one_revision(self, api: Api) -> None:
        """Whatever it sets."""
        session = await api.session(user_id="ann", labels=LABELS)
        changed = await update_session(
            api,
            session.id,
            "status",
            "title",
            "labels",
            status=RESOLVED,
            title="t",
            labels={"a": ""},
        )
        assert (changed.status, changed.title, dict(changed.labels)) == (RESOLVED, "t", {"a": ""})
        assert (changed.user_id, changed.revision) == ("ann", 1)
        assert changed.update_time.ToNanoseconds() > session.update_time.ToNanoseconds()
        assert await get_session(api, session.id) == changed

    async def test_only_what_the_mask_names_changes(self, api: Api) -> None:
        """The other fields of the request are not read."""
        session = await api.session(title="old", labels=LABELS)
        changed = await update_session(
            api, session.id, "title", title="new", labels={"BAD": "\n"}, status=77
        )
        assert (changed.title, dict(changed.labels)) == ("new", LABELS)
        assert changed.status == session.status

    async def test_empty_title_and_no_labels_remove_them(self, api: Api) -> None:
        """As if they had never been set."""
        session = await api.session(title="t", labels=LABELS)
        changed = await update_session(api, session.id, "title", "labels")
        assert (changed.title, dict(changed.labels), changed.revision) == ("", {}, 1)

    async def test_setting_the_current_values_changes_nothing(self, api: Api) -> None:
        """No revision, no time."""
        session = await api.session(title="t", labels=LABELS)
        for paths in (["title", "labels"], ["labels.plan", "labels.absent"], ["labels.region"]):
            assert (
                await update_session(api, session.id, *paths, title="t", labels=LABELS) == session
            )

    async def test_one_label_is_set_and_removed(self, api: Api) -> None:
        """By its key: all that follows the first dot. The other labels stay."""
        session = await api.session(labels=LABELS)
        for key in KEYS:
            changed = await update_session(
                api, session.id, f"labels.{key}", labels={key: key, "plan": "not named"}
            )
            assert dict(changed.labels) == {**LABELS, key: key}
            changed = await update_session(api, session.id, f"labels.{key}")
            assert dict(changed.labels) == LABELS

    async def test_several_labels_change_in_one_revision(self, api: Api) -> None:
        """One is set, one replaced, one removed."""
        session = await api.session(labels=LABELS)
        changed = await update_session(
            api,
            session.id,
            "labels.a",
            "labels.plan",
            "labels.region",
            labels={"a": "", "plan": "x"},
        )
        assert (dict(changed.labels), changed.revision) == ({"a": "", "plan": "x"}, 1)

    async def test_a_thirty_third_label_is_refused(self, api: Api) -> None:
        """Nothing changes. There is room when another is removed in the same call."""
        labels = {f"key-{n}": str(n) for n in range(32)}
        session = await api.session(labels=labels)
        with refused(StatusCode.FAILED_PRECONDITION, "TOO_MANY_LABELS") as refusal:
            await update_session(
                api, session.id, "title", "labels.more", title="t", labels={"more": "x"}
            )
        [violation] = refusal.details["PreconditionFailure"].violations
        assert violation.subject == f"chat_sessions/{session.id}"
        assert await get_session(api, session.id) == session
        changed = await update_session(
            api, session.id, "labels.more", "labels.key-0", labels={"more": "x"}
        )
        assert len(changed.labels) == 32

    async def test_violations_are_reported_together(self, api: Api) -> None:
        """Nothing changes."""
        session = await api.session(labels=LABELS)
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await update_session(
                api,
                session.id,
                *("status", "title", "labels.a", "labels.b"),
                status=77,
                title="a\nb",
                labels={"a": "v" * 256, "b": "\x7f", "NOT": "\n"},
            )
        assert refusal.fields == {
            "session.status": "unknown enum value 77",
            "session.title": CONTROL,
            "session.labels[a]": "256 characters, at most 255",
            "session.labels[b]": CONTROL,
        }
        assert await get_session(api, session.id) == session

    @pytest.mark.parametrize(
        ("paths", "said"),
        [
            (["user_id"], "cannot be updated, only: status, title, labels, labels.KEY"),
            (["title.x"], "cannot be updated"),
            (["labels."], "has a key that is not 1 to 63 characters"),
            (["labels.Upper"], "has a key that is not 1 to 63 characters"),
            (["labels." + "k" * 64], "has a key that is not 1 to 63 characters"),
            (["labels", "labels.plan"], "'labels.plan' together with 'labels'"),
        ],
    )
    async def test_mask_names_what_can_change(self, api: Api, paths: list[str], said: str) -> None:
        """Nothing changes otherwise."""
        session = await api.session(user_id="ann", labels=LABELS)
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await update_session(api, session.id, *paths, user_id="bob", labels={"plan": "x"})
        assert list(refusal.fields) == ["update_mask"]
        assert said in refusal.fields["update_mask"]
        assert await get_session(api, session.id) == session

    async def test_stale_etag_is_aborted(self, api: Api) -> None:
        """Also when a label would stay as it is."""
        session = await api.session(labels=LABELS)
        await update_session(api, session.id, "labels.plan", labels={"plan": "x"})
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await update_session(
                api, session.id, "labels.plan", labels={"plan": "x"}, etag=session.etag
            )

    async def test_callers_that_set_different_labels_keep_each_others(self, api: Api) -> None:
        """Each of thirty calls at once is a revision, and none is lost."""
        session = await api.session()
        keys = [f"key-{n}" for n in range(30)]
        await asyncio.gather(
            *(update_session(api, session.id, f"labels.{key}", labels={key: key}) for key in keys)
        )
        changed = await get_session(api, session.id)
        assert (dict(changed.labels), changed.revision) == (dict(zip(keys, keys, strict=True)), 30)


async def test_appends_to_a_labeled_session_are_hot(start_server: Any, fresh_database: str) -> None:
    """Its user and its labels are indexed, and a message writes to none of their indexes."""
    api = await start_server(fresh_database)
    session = await api.session(user_id="ann", title="t", labels=LABELS)
    updates = 0
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        # PostgreSQL's processes report what they have counted every second at most.
        while updates < 20:
            await api.message(session.id)
            await asyncio.sleep(0.1)
            [[updates, hot]] = connection.execute(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
                " WHERE relname = 'chat_sessions'"
            )
    assert hot >= updates - 1, "the index of update hours is written to once an hour"
