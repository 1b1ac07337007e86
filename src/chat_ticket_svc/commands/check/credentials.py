"""Checks the server's certificate, the policy of client certificates and the keys of tokens."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from chat_ticket_svc.access.client_certificate_authenticator import ClientCertificateAuthenticator
from chat_ticket_svc.access.jwks import JwksClient
from chat_ticket_svc.access.jwt_authenticator import JwtAuthenticator, TokenRejectedError
from chat_ticket_svc.access.server_certificates import ServerCertificates
from chat_ticket_svc.commands.check.line import OK, WARNING, CheckFailed, Line, run_check
from chat_ticket_svc.config import Settings
from chat_ticket_svc.telemetry.redaction import quote

MIN_CERTIFICATE_DAYS = 14


async def check_credentials(settings: Settings, token: str) -> AsyncIterator[Line]:
    """The server's certificate, the client certificates, the keys of tokens, and a token."""

    async def certificate() -> Line:
        certificates = ServerCertificates.from_settings(settings)
        assert certificates is not None  # noqa: S101 - for the type checker
        days = (certificates.certificate.not_valid_after_utc - datetime.now(UTC)).days
        state = OK if days >= MIN_CERTIFICATE_DAYS else WARNING
        return Line(state, "certificate", f"matches its key, expires in {days} days")

    async def policy() -> Line:
        assert settings.mtls_policy is not None  # noqa: S101 - for the type checker
        count = len(ClientCertificateAuthenticator(settings.mtls_policy))
        return Line(OK, "policy", f"client certificates listed: {count}")

    async def jwks() -> Line:
        key_ids = await JwksClient(settings.jwks).fetch_key_ids()
        return Line(OK, "jwks", f"key ids: {', '.join(key_ids)}")

    async def verify_token() -> Line:
        authenticator = JwtAuthenticator.from_settings(JwksClient(settings.jwks), settings)
        try:
            credential = await authenticator.verify(token)
        except TokenRejectedError as error:
            raise CheckFailed(str(error)) from error
        tenants = "*" if credential.tenants is None else ", ".join(sorted(credential.tenants))
        # A token may be for thousands of tenants.
        tenants = quote(tenants)
        permissions = ", ".join(sorted(credential.permissions)) or "none"
        minutes = (credential.expires_at - time.time()) / 60
        text = f"subject {credential.subject or 'not named'}; permissions: {permissions}"
        return Line(OK, "token", f"{text}; tenants: {tenants}; expires in {minutes:,.0f} minutes")

    if settings.tls_certificate is not None:
        yield await run_check("certificate", certificate())
    if "mtls" in settings.auth:
        yield await run_check("policy", policy())
    if "jwt" in settings.auth:
        yield await run_check("jwks", jwks())
        if token:
            yield await run_check("token", verify_token())
