"""What `chat-ticket-svc check` has printed."""

import re

from support.process import Finished


def line(done: Finished, about: str) -> tuple[str, str]:
    """The state and the text of the line about a subject."""
    found = re.findall(rf"^(\S+) +{about} +(.*)$", done.output, re.MULTILINE)
    assert len(found) == 1, done
    return found[0]
