"""A server that requires tokens."""

import contextlib
from collections.abc import Callable

from support.authority import AUDIENCE, ISSUER, Key
from support.client import Api

SETTINGS = {"auth": "jwt", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}


# By default the server trusts ES256 tokens of this key only.
KEY = Key()


NewApi = Callable[..., Api]


class JwtServer:
    """A server that requires tokens, and its clients."""

    def __init__(self, address: str, stack: contextlib.AsyncExitStack):
        self.address = address
        self._stack = stack

    async def api(self, token: str, tenant: str = "") -> Api:
        return await self._stack.enter_async_context(Api(self.address, tenant, token=token))
