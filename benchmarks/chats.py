"""The data of all parts: what people wrote in the chats of `chitchat-dataset` (MIT)."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import chitchat_dataset
import psycopg
import uuid_utils


class Utterance(NamedTuple):
    """Something to store as a message."""

    role: str  # user or assistant: who spoke first in the chat is the user
    content: str
    metadata: str | None  # a JSON object


@functools.cache
def chats() -> tuple[tuple[Utterance, ...], ...]:
    """What has text of the 7,168 chats, in the order of the dataset."""
    found = []
    for chat in chitchat_dataset.Dataset().values():
        said = [each for turn in chat["messages"] for each in turn if each["text"]]
        found.append(
            tuple(
                Utterance(
                    "user" if each["sender"] == said[0]["sender"] else "assistant",
                    each["text"],
                    json.dumps({"sent_at": each["timestamp"], "sender": each["sender"]}),
                )
                for each in said
            )
        )
    return tuple(found)


@functools.cache
def utterances() -> tuple[Utterance, ...]:
    """All of them, 258,112."""
    return tuple(itertools.chain.from_iterable(chats()))


STORE = """
COPY chat_messages (tenant_id, id, session_id, sequence, revision, role, content, metadata)
FROM STDIN
"""


def store(
    db: psycopg.Connection, tenant_id: str, session_id: str, said: Iterable[Utterance]
) -> None:
    """Create a session with these messages by the fastest way there is."""
    session = (tenant_id, session_id)
    sequence = 0
    with db.transaction(), db.cursor() as cursor:
        cursor.execute("INSERT INTO chat_sessions (tenant_id, id) VALUES (%s, %s)", session)
        with cursor.copy(STORE) as copy:
            for sequence, each in enumerate(said, start=1):
                message_id = str(uuid_utils.uuid7())
                copy.write_row((tenant_id, message_id, session_id, sequence, sequence, *each))
        cursor.execute(
            "UPDATE chat_sessions SET revision = %s WHERE tenant_id = %s AND id = %s",
            (sequence, *session),
        )


def repeated() -> Iterator[Utterance]:
    """The utterances without an end: from the first again after the last."""
    return itertools.cycle(utterances())
