"""`chat-ticket-svc token`: signs a token with a development key pair."""

import argparse
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
from chat_ticket_svc.commands import arguments
from chat_ticket_svc.config import ConfigurationError

ISSUER = "chat-ticket-svc development"
AUDIENCE = "chat-ticket-svc"
KEY_ID = "development"
KEY_FILE = "development-key.pem"
ALGORITHM = "ES256"
MAX_SECONDS = 1_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tenant",
        action="append",
        default=[],
        type=arguments.tenant_id,
        metavar="ID",
        help="a tenant that the token is for; repeatable (default: all tenants)",
    )
    parser.add_argument(
        "--permission",
        action="append",
        default=[],
        choices=[permission.value for permission in Permission],
        help="a permission of the token; repeatable (default: all permissions)",
    )
    parser.add_argument(
        "--seconds",
        type=arguments.integer(1, MAX_SECONDS),
        default=3600,
        metavar="N",
        help="the lifetime (default: %(default)s)",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(".data"),
        help="the directory of the development key, which is created if it does not exist;"
        " the parent of the directory of `serve --embedded` (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    token = sign_token(
        options.directory,
        tenants=options.tenant,
        permissions=options.permission,
        seconds=options.seconds,
    )
    print(token)
    return 0


def development_settings(directory: Path) -> dict[str, str]:
    """The settings of a server that accepts tokens signed with the key in `directory`."""
    key, _ = _read_or_create_key(directory)
    public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    keys = {"keys": [{**public, "kid": KEY_ID, "alg": ALGORITHM, "use": "sig"}]}
    path = directory / "development-keys.json"
    path.write_text(json.dumps(keys) + "\n")
    return {
        "jwks": str(path),
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_algorithms": ALGORITHM,
    }


def sign_token(
    directory: Path, *, tenants: Sequence[str], permissions: Sequence[str], seconds: int
) -> str:
    """A token signed with the key in `directory`, which is created if it does not exist.

    Without `tenants` the token is for all tenants. Without `permissions` it grants all of them.
    """
    key, is_new = _read_or_create_key(directory)
    if is_new:
        print(f"created a key in {directory}; no running server trusts it", file=sys.stderr)
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
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": KEY_ID})


def _read_or_create_key(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, bool]:
    """The key in `directory`, and whether it was created."""
    path = directory / KEY_FILE
    try:
        is_new = not path.exists()
        if is_new:
            _create_key(path)
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot read or create the key") from error
    return key, is_new  # type: ignore[return-value]


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
