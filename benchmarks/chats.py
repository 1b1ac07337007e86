"""The messages that all parts use: the chats of `chitchat-dataset` (MIT)."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import chitchat_dataset
import psycopg
import uuid_utils


class Utterance(NamedTuple):
    """The content of a message."""

    role: str  # user or assistant; the first speaker of the chat is the user
    content: str
    metadata: str | None  # a JSON object


@functools.cache
def chats() -> tuple[tuple[Utterance, ...], ...]:
    """The utterances with text of the 7,168 chats, in the order of the dataset."""
    result = []
    for chat in chitchat_dataset.Dataset().values():
        utterances = [u for turn in chat["messages"] for u in turn if u["text"]]
        result.append(
            tuple(
                Utterance(
                    "user" if u["sender"] == utterances[0]["sender"] else "assistant",
                    u["text"],
                    json.dumps({"sent_at": u["timestamp"], "sender": u["sender"]}),
                )
                for u in utterances
            )
        )
    return tuple(result)


@functools.cache
def utterances() -> tuple[Utterance, ...]:
    """The 258,112 utterances of all chats."""
    return tuple(itertools.chain.from_iterable(chats()))


STORE = """
COPY chat_messages (tenant_id, id, session_id, sequence, revision, role, content, metadata)
FROM STDIN
"""


def store(
    db: psycopg.Connection, tenant_id: str, session_id: str, utterances: Iterable[Utterance]
) -> None:
    """Create a session with these messages by COPY, which is the fastest way."""
    session = (tenant_id, session_id)
    sequence = 0
    with db.transaction(), db.cursor() as cursor:
        cursor.execute("INSERT INTO chat_sessions (tenant_id, id) VALUES (%s, %s)", session)
        with cursor.copy(STORE) as copy:
            for sequence, utterance in enumerate(utterances, start=1):
                message_id = str(uuid_utils.uuid7())
                copy.write_row((tenant_id, message_id, session_id, sequence, sequence, *utterance))
        cursor.execute(
            "UPDATE chat_sessions SET revision = %s WHERE tenant_id = %s AND id = %s",
            (sequence, *session),
        )


def repeated() -> Iterator[Utterance]:
    """The utterances, repeated endlessly."""
    return itertools.cycle(utterances())


def pieces(count: int, size: int) -> list[str]:
    """The beginning of the chats as pieces of `size` bytes."""
    text = ""
    for utterance in repeated():
        # Each character is a byte.
        text += utterance.content.encode("ascii", "ignore").decode()
        if len(text) >= count * size:
            break
    return [text[at : at + size] for at in range(0, count * size, size)]
