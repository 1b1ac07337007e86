"""Maps the errors of psycopg to domain errors. rpc/status.py maps these to gRPC statuses."""

import contextlib
import time
from collections.abc import Iterator
from typing import Self

import psycopg
from psycopg import errors as pg_errors

from chat_ticket_svc import errors
from chat_ticket_svc.config import ConfigurationError


class ConstraintViolation(Exception):  # noqa: N818 - a signal to the store, never to a caller
    """A write violates a named constraint. The store function raises the domain error for it."""

    def __init__(self, constraint: str):
        super().__init__(constraint)
        self.constraint = constraint


class ConnectionLost(Exception):  # noqa: N818 - as above
    """The connection broke while a statement was in flight."""


class StatementCanceled(pg_errors.QueryCanceled):
    """A statement that was canceled before its timeout."""


class CancellationDetector:
    """Turns QueryCanceled into StatementCanceled when the statement in the block had time left.

    PostgreSQL gives both causes the same SQLSTATE, and their texts depend on its language.
    """

    __slots__ = ("_started_at", "_timeout_seconds")

    _started_at: float

    def __init__(self, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> Self:
        self._started_at = time.monotonic()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        has_time_left = time.monotonic() < self._started_at + self._timeout_seconds
        if isinstance(error, pg_errors.QueryCanceled) and has_time_left:
            raise StatementCanceled from error


def translate(error: psycopg.Error) -> Exception:
    """The domain error or ConstraintViolation for a driver error; unknown errors are unchanged."""
    match error.sqlstate or "":
        case state if state.startswith("23"):
            return ConstraintViolation(error.diag.constraint_name or "")
        case "55P03":  # lock_not_available
            return errors.ContentionError()
        case "57014" if isinstance(error, StatementCanceled):
            return errors.StatementCanceledError()
        case "57014":  # query_canceled, by statement_timeout; our own deadlines cancel the task
            return errors.DeadlineExceededError()
        case "53100":  # disk_full
            return errors.ResourceExhaustedError("the database's disk is full", reason="DISK_FULL")
        case state if state.startswith("53"):  # insufficient_resources
            return errors.ResourceExhaustedError(
                "the database is out of resources", reason="DATABASE_RESOURCES"
            )
        case "0A000":  # feature_not_supported
            return errors.UnsupportedError(
                "the database server does not support a feature that this call needs",
                reason="UNSUPPORTED_BY_DATABASE",
            )
        case "25006":  # read_only_sql_transaction: a standby, or during a failover
            return errors.UnavailableError("the database is read-only", reason="DATABASE_READ_ONLY")
        case state if state.startswith(("22", "54")):  # data_exception, program_limit_exceeded
            return errors.InvalidArgumentError(
                [errors.Violation("", "a value that the database cannot store")]
            )
    return error


# Messages of these SQLSTATEs name objects, rights, locks or resources, and never quote a row.
# Those of a class like 22 (`invalid input syntax for type integer: "…"`) do.
_SAFE_STATES = ("0A", "23", "2BP01", "25006", "3F", "40", "42", "53", "54", "55", "57")


def describe(sqlstate: str, message: str) -> str:
    """An error of PostgreSQL for an operator: its message, unless that may quote a row.

    `message` is the primary message; DETAIL and HINT quote rows and must not be part of it.
    """
    if not message or not sqlstate.startswith(_SAFE_STATES):
        return f"SQLSTATE {sqlstate}"
    return f"{message} (SQLSTATE {sqlstate})"


@contextlib.contextmanager
def missing_right_for_operator() -> Iterator[None]:
    """Raise ConfigurationError with PostgreSQL's text when the role of a command lacks a right."""
    try:
        yield
    except pg_errors.InsufficientPrivilege as error:
        reason = describe(error.sqlstate or "", error.diag.message_primary or "")
        raise ConfigurationError(f"the database refuses: {reason}") from error
