"""Tokens for development: a key pair of one's own, and what it signs."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from chat_ticket_svc.access.credential import ALL_TENANTS, Permission
from chat_ticket_svc.config import ConfigurationError

ISSUER = "chat-ticket-svc development"
AUDIENCE = "chat-ticket-svc"
KEY_ID = "development"
KEY_FILE = "development-key.pem"
ALGORITHM = "ES256"


def settings(directory: Path) -> dict[str, str]:
    """Those by which a server believes the tokens of `directory`."""
    public = ECAlgorithm.to_jwk(_key(directory).public_key(), as_dict=True)
    keys = {"keys": [{**public, "kid": KEY_ID, "alg": ALGORITHM, "use": "sig"}]}
    path = directory / "development-keys.json"
    path.write_text(json.dumps(keys) + "\n")
    return {
        "jwt_keys": str(path),
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_algorithms": ALGORITHM,
    }


def token(
    directory: Path, *, tenants: Sequence[str], permissions: Sequence[str], seconds: int
) -> str:
    """A token signed with the key of `directory`, which is made when there is none.

    No `tenants` are all tenants, no `permissions` all permissions.
    """
    if not (directory / KEY_FILE).exists():
        print(f"no server knows the new key in {directory} yet", file=sys.stderr)
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "developer",
        "iat": now,
        "exp": now + seconds,
        "tenants": list(tenants) or ALL_TENANTS,
        "scope": " ".join(permissions or Permission),
    }
    return jwt.encode(claims, _key(directory), algorithm=ALGORITHM, headers={"kid": KEY_ID})


def _key(directory: Path) -> ec.EllipticCurvePrivateKey:
    path = directory / KEY_FILE
    try:
        if not path.exists():
            _make_key(path)
        return serialization.load_pem_private_key(path.read_bytes(), None)  # type: ignore[return-value]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: no key can be read or made there") from error


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
