"""URLs, parsed as the WHATWG URL standard says, which browsers and Node follow.

One parsed URL is both checked and asked, so there is no second parser that could see another host.
"""

import re
from dataclasses import dataclass

from ada_url import URL

from chat_ticket_svc.services import single_line

# Parsers of RFC 3986 and of WHATWG find the host in the same place. WHATWG also takes text without
# the slashes, and a backslash for a slash.
SCHEME_AND_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#\\]+)(?![^/?#])")


@dataclass(frozen=True, kw_only=True)
class WebUrl:
    """A URL in its serialised form: ASCII, with an IDN host in punycode.

    `host` has no brackets. `port` is None for the scheme's own. `authority` is the host and port
    for the Host header. `target` is the path and query.
    """

    href: str
    scheme: str
    has_user_info: bool
    host: str
    port: int | None
    authority: str
    target: str


def parse(text: str) -> WebUrl:
    """Parse an absolute URL of one line. ValueError for others, and for port 0."""
    found = SCHEME_AND_AUTHORITY.match(text)
    if found is None or any(single_line.violations(text)):
        raise ValueError("not a URL")
    return _parsed(URL(text), has_user_info="@" in found[1])


def join(base: WebUrl, location: str) -> WebUrl:
    """The URL that `location` means in a redirect from `base`."""
    return _parsed(URL(location, base.href), has_user_info=False)


def _parsed(url: URL, *, has_user_info: bool) -> WebUrl:
    port = int(str(url.port)) if url.port else None
    if port == 0 or not url.hostname:
        raise ValueError("not a URL of a host")
    return WebUrl(
        href=str(url.href),
        scheme=str(url.protocol).removesuffix(":"),
        has_user_info=has_user_info or bool(url.username or url.password),
        host=str(url.hostname).strip("[]"),
        port=port,
        authority=str(url.host),
        target=f"{url.pathname}{url.search}",
    )
