"""Secrets for tests, and a search for them in every encoding."""

import base64
import re
import uuid

# Letters and digits only: the same in JSON, in a percent-encoded URL and in a repr.
MARKED = "CaNaRy7qXw"


def secret(kind: str) -> str:
    return f"{MARKED}{kind}{uuid.uuid4().hex[:6]}"


def _forms() -> list[bytes]:
    plain = MARKED.lower().encode()
    forms = [plain, MARKED.encode().hex().encode()]
    for before in range(3):  # base64 looks different at each place in three bytes
        coded = base64.b64encode(b"\0" * before + MARKED.encode() + b"\0" * (2 - before))
        forms.append(coded[(before * 4 + 2) // 3 : (before + len(MARKED)) * 4 // 3].lower())
    return forms


def leaks(written: str | bytes) -> list[bytes]:
    """The context of each secret in some output; empty if there is none."""
    data = written.encode() if isinstance(written, str) else written
    found = re.finditer(b"|".join(map(re.escape, _forms())), data.lower())
    return [data[max(0, each.start() - 200) : each.end() + 100] for each in found]
