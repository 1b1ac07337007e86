"""Credentials: the tenants and permissions that authentication grants a caller."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chat_ticket_svc.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    Violation,
)

TENANT_KEY = "x-tenant-id"
# Printable ASCII without leading or trailing spaces, because tenant ids travel in metadata.
TENANT_ID = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")

ALL_TENANTS = "*"

# A call's metadata as received. Reading it from gRPC costs a tenth of a call, so the
# instrumentation reads it once and passes it on.
Metadata = Sequence[tuple[str, str | bytes]]


def metadata_values(metadata: Metadata, key: str) -> list[str | bytes]:
    return [value for name, value in metadata if name == key]


class Permission(StrEnum):
    """What a method may do. method_permissions.py assigns one to each method."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"
    TICKET = "ticket"


@dataclass(frozen=True, kw_only=True)
class Credential:
    """The tenants that a caller may act for (None means any), its permissions, and its expiry.

    `expires_at` is in seconds since the epoch. `subject` is who the caller is, for the log.
    """

    tenants: frozenset[str] | None
    permissions: frozenset[Permission]
    expires_at: float = math.inf
    subject: str | None = None

    def __and__(self, other: Credential) -> Credential:
        """A credential that allows only what both allow."""
        tenants = self.tenants
        if tenants is None:
            tenants = other.tenants
        elif other.tenants is not None:
            tenants &= other.tenants
        return Credential(
            tenants=tenants,
            permissions=self.permissions & other.permissions,
            expires_at=min(self.expires_at, other.expires_at),
            subject=", ".join(filter(None, (self.subject, other.subject))) or None,
        )

    def require_permission(self, permission: Permission) -> None:
        """Raises PermissionDeniedError if the credential lacks `permission`."""
        if permission not in self.permissions:
            raise PermissionDeniedError(
                f"credential lacks the permission {permission}",
                reason="PERMISSION_REQUIRED",
                metadata={"permission": permission},
            )

    def select_tenant(self, requested: Collection[str | bytes]) -> str:
        """The tenant that a call acts for. `requested` holds the values of its TENANT_KEY.

        Raises UnauthenticatedError if the call must name a tenant and does not,
        InvalidArgumentError for a malformed tenant id, and PermissionDeniedError for a tenant that
        the credential does not allow.
        """
        if not requested:
            if self.tenants is not None and len(self.tenants) == 1:
                return next(iter(self.tenants))
            raise UnauthenticatedError(
                f"metadata key {TENANT_KEY} is missing", reason="TENANT_REQUIRED"
            )
        tenant = next(iter(requested))
        if len(requested) > 1 or not isinstance(tenant, str) or not TENANT_ID.fullmatch(tenant):
            raise InvalidArgumentError(
                [
                    Violation(
                        TENANT_KEY,
                        "must occur once, with 1 to 255 printable ASCII characters"
                        " and no leading or trailing spaces",
                    )
                ]
            )
        if self.tenants is not None and tenant not in self.tenants:
            raise PermissionDeniedError(
                "credential is not valid for this tenant", reason="TENANT_NOT_ALLOWED"
            )
        return tenant


def credential_expired(diagnosis: Mapping[str, str] | None = None) -> UnauthenticatedError:
    return UnauthenticatedError(
        "credential has expired", reason="CREDENTIAL_EXPIRED", diagnosis=diagnosis
    )


# For every caller of a server without authenticators.
FULL_ACCESS = Credential(tenants=None, permissions=frozenset(Permission))


def parse_tenants(value: object) -> frozenset[str] | None:
    """The tenants that `value` lists, or None for "*", which means all. Raises ValueError."""
    if value == ALL_TENANTS:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError('must be a non-empty list of tenant ids, or "*"')
    if not all(isinstance(tenant, str) and TENANT_ID.fullmatch(tenant) for tenant in value):
        raise ValueError("must contain only valid tenant ids")
    return frozenset(value)
