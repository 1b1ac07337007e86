"""The catalog of reasons, which docs/reference/errors.md lists, is what the code raises."""

import ast
from collections.abc import Iterator
from pathlib import Path

import chat_ticket_svc
from chat_ticket_svc import errors, reasons
from chat_ticket_svc.rpc.status import STATUS_CODES

ROOT = Path(chat_ticket_svc.__file__).parent
CATALOG = {reason.name: reason.status for reason in reasons.REASONS}
# What no domain error stands for: rpc/status.py raises it.
INTERNAL = ("INTERNAL", "INTERNAL")


def status_of(kind: type[errors.DomainError]) -> str:
    return next(code.name for base, code in STATUS_CODES if issubclass(kind, base))


def raised() -> Iterator[tuple[str, str]]:
    """Each reason in the source, with the status of the error that carries it."""
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        owners = {
            id(node): owner.name
            for owner in ast.walk(tree)
            if isinstance(owner, ast.ClassDef)
            for node in ast.walk(owner)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield from reasons_of(node, owners.get(id(node), ""))


def reasons_of(call: ast.Call, owner: str) -> Iterator[tuple[str, str]]:
    """Those of one call: its keyword `reason`, or the resource that it names first."""
    name = ast.unparse(call.func).rpartition(".")[2]
    first = call.args[0] if call.args else None
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        if name == "NotFoundError":
            yield f"{first.value.upper()}_NOT_FOUND", "NOT_FOUND"
        elif name == "id_taken":
            yield f"{first.value.upper()}_ALREADY_EXISTS", "ALREADY_EXISTS"
    for keyword in call.keywords:
        if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
            # In an error's own class the call is super().__init__(...).
            kind = getattr(errors, owner if name == "__init__" else name, None)
            status = status_of(kind) if kind is not None else "INTERNAL"
            yield keyword.value.value, status


def test_catalog_has_every_reason_with_its_status() -> None:
    """Nothing is raised that the catalog does not have, nor the other way round."""
    assert {*raised()} == {*CATALOG.items()}
    assert INTERNAL in {*raised()}


def test_each_reason_is_listed_once_with_a_remedy() -> None:
    """One row of the page for each, with nothing left out."""
    assert len(CATALOG) == len(reasons.REASONS)
    for reason in reasons.REASONS:
        assert reason.meaning.endswith("."), reason
        assert reason.action.endswith("."), reason
