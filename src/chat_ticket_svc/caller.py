"""Who makes a call: the one place where it gets its tenant, and where credentials belong."""

import re
from typing import Any

import grpc.aio

from chat_ticket_svc.errors import InvalidArgumentError, UnauthenticatedError, Violation

TENANT_KEY = "x-tenant-id"
# Printable ASCII, without spaces around it: it travels in metadata.
TENANT_ID = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")


def tenant_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The tenant that the call acts for."""
    given = [value for key, value in context.invocation_metadata() or () if key == TENANT_KEY]
    if not given:
        raise UnauthenticatedError(
            f"the metadata key {TENANT_KEY} is missing", reason="TENANT_REQUIRED"
        )
    tenant = given[0]
    if len(given) > 1 or not isinstance(tenant, str) or not TENANT_ID.fullmatch(tenant):
        raise InvalidArgumentError(
            [Violation(TENANT_KEY, "is not one text of 1 to 255 printable ASCII characters")]
        )
    return tenant
