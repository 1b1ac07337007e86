"""What a caller has proved, whichever way it did."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chat_ticket_svc.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    Violation,
)

TENANT_KEY = "x-tenant-id"
# Printable ASCII, without spaces around it: it travels in metadata.
TENANT_ID = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")

ALL_TENANTS = "*"

# Of a call, as it came: to ask gRPC for it costs a tenth of a call, so it is asked for once.
Metadata = Sequence[tuple[str, str | bytes]]


def values(metadata: Metadata, key: str) -> list[str | bytes]:
    return [value for each, value in metadata if each == key]


class Permission(StrEnum):
    """What a call does; methods.py says which of them it takes."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"
    TICKET = "ticket"


@dataclass(frozen=True, kw_only=True)
class Credential:
    """The tenants that a caller may act for (None: any), what it may do, and until when.

    `expires_at` is in seconds since the epoch.
    """

    tenants: frozenset[str] | None
    permissions: frozenset[Permission]
    expires_at: float = math.inf

    def __and__(self, other: Credential) -> Credential:
        """What both allow."""
        tenants = self.tenants
        if tenants is None:
            tenants = other.tenants
        elif other.tenants is not None:
            tenants &= other.tenants
        return Credential(
            tenants=tenants,
            permissions=self.permissions & other.permissions,
            expires_at=min(self.expires_at, other.expires_at),
        )

    def require(self, permission: Permission) -> None:
        if permission not in self.permissions:
            raise PermissionDeniedError(
                f"the credential has no permission to {permission}",
                reason="PERMISSION_REQUIRED",
                metadata={"permission": permission},
            )

    def tenant(self, given: Collection[str | bytes]) -> str:
        """The tenant that a call acts for, which names `given` in its metadata."""
        if not given:
            if self.tenants is not None and len(self.tenants) == 1:
                return next(iter(self.tenants))
            raise UnauthenticatedError(
                f"the metadata key {TENANT_KEY} is missing", reason="TENANT_REQUIRED"
            )
        tenant = next(iter(given))
        if len(given) > 1 or not isinstance(tenant, str) or not TENANT_ID.fullmatch(tenant):
            raise InvalidArgumentError(
                [Violation(TENANT_KEY, "is not one text of 1 to 255 printable ASCII characters")]
            )
        if self.tenants is not None and tenant not in self.tenants:
            raise PermissionDeniedError(
                "the credential is not for this tenant", reason="TENANT_NOT_ALLOWED"
            )
        return tenant


def expired() -> UnauthenticatedError:
    return UnauthenticatedError("the credential has expired", reason="CREDENTIAL_EXPIRED")


# What every caller may who needs to prove nothing.
EVERYTHING = Credential(tenants=None, permissions=frozenset(Permission))


def tenants_of(value: object) -> frozenset[str] | None:
    """The tenants that `value` lists; "*" is all of them. Raises ValueError."""
    if value == ALL_TENANTS:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError('is neither a list of tenant ids nor "*"')
    if not all(isinstance(each, str) and TENANT_ID.fullmatch(each) for each in value):
        raise ValueError("holds something that is no tenant id")
    return frozenset(value)
