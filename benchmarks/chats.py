"""The data of all parts: what people wrote in the chats of `chitchat-dataset` (MIT)."""

import functools
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

import chitchat_dataset


class Utterance(NamedTuple):
    """Something to store as a message."""

    role: str  # user or assistant: who spoke first in the chat is the user
    content: str
    metadata: str  # a JSON object


@functools.cache
def utterances() -> tuple[Utterance, ...]:
    """All that has text, 258,112 in the order of the dataset."""
    found = []
    for chat in chitchat_dataset.Dataset().values():
        said = [each for turn in chat["messages"] for each in turn if each["text"]]
        for each in said:
            role = "user" if each["sender"] == said[0]["sender"] else "assistant"
            metadata = {"sent_at": each["timestamp"], "sender": each["sender"]}
            found.append(Utterance(role, each["text"], json.dumps(metadata)))
    return tuple(found)


def repeated() -> Iterator[Utterance]:
    """The utterances without an end: from the first again after the last."""
    return itertools.cycle(utterances())
