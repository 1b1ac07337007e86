"""Isolation: what is another tenant's looks exactly like what does not exist, and stays as it is.

For every id in the request of every RPC, found in the descriptors; for every statement, as
PostgreSQL plans it; and for every key of the schema, against plain SQL.
"""

import ast
import asyncio
import base64
import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import grpc.aio
import psycopg
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from grpc import StatusCode
from psycopg import sql
from psycopg.types.json import Jsonb
from support.client import Api, a_file, an_id
from test_layers import FILES, PSYCOPG, ROOT, room
from test_messages import delete
from test_tickets import unlink

import chat_ticket_svc
from chat_ticket.v1 import chat_attachment_pb2 as files_pb
from chat_ticket.v1 import chat_message_pb2 as messages_pb
from chat_ticket.v1 import chat_session_pb2 as sessions_pb
from chat_ticket.v1 import chat_ticket_pb2 as tickets_pb
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.server import SERVICES

RPCS = [
    method
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
]

# The strings of requests that name nothing: whatever else is text is an id or a page token.
TEXTS = {
    *("title", "content", "metadata_json", "file_url", "file_name", "file_type", "query", "etag"),
    "paths",  # of a FieldMask
}

# What requests carry and no call reads.
IGNORED = {
    *("ChatSession.tenant_id", "Ticket.tenant_id"),
    *("ChatMessage.session_id", "ChatAttachment.message_id"),
    "UpdateChatMessage message.attachments[0].id",
}

ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[\d.]*(Z|[+-][\d:]+)")
PROBE = "00000000-0000-4000-8000-000000000000"  # stands for the id in question
NEXT_PAGE = re.compile(r'(?<="nextPageToken": ")[^"]+')


@dataclasses.dataclass(frozen=True)
class World:
    """The ids of all that a tenant has."""

    tenant: str
    session: str = dataclasses.field(default_factory=an_id)
    sharing: str = dataclasses.field(default_factory=an_id)  # another session with the ticket
    bare: str = dataclasses.field(default_factory=an_id)  # a session without one
    message: str = dataclasses.field(default_factory=an_id)
    deleted: str = dataclasses.field(default_factory=an_id)  # a message that was
    file: str = dataclasses.field(default_factory=an_id)
    second: str = dataclasses.field(default_factory=an_id)  # another file of the message
    ticket: str = dataclasses.field(default_factory=an_id)
    spare: str = dataclasses.field(default_factory=an_id)  # a ticket without a session
    link: str = dataclasses.field(default_factory=an_id)

    @property
    def content(self) -> str:
        return f"hello, {self.tenant}"

    def a_file(self, file_id: str = "") -> r.ChatAttachment:
        return a_file(id=file_id, message_id=self.message, file_name=self.tenant)

    async def make(self, api: Api) -> None:
        """All of it, with the tenant's name wherever there is text."""
        for session in (self.session, self.sharing, self.bare):
            await api.session(id=session)
        files = [self.a_file(self.file), self.a_file(self.second)]
        await api.message(self.session, self.content, id=self.message, attachments=files)
        await api.message(self.session, self.content, id=self.deleted)
        await delete(api, self.deleted)
        await api.message(self.session, self.content)
        ticket = r.Ticket(id=self.ticket, title=self.tenant, status=r.TICKET_STATUS_SOLVED)
        await api.escalate(self.session, chat_ticket_id=self.link, ticket=ticket)
        await api.escalate(self.sharing, ticket_id=self.ticket)
        spare = r.Ticket(id=self.spare, title=self.tenant)
        await unlink(api, (await api.escalate(self.bare, ticket=spare)).id)


def calls(w: World) -> dict[str, dict[str, Message]]:
    """For each RPC, calls that a tenant makes about its own; together they set every id.

    Those called `taken` are refused, because something new cannot have the id at that path; the
    others succeed. A page token is that of the page after the first.
    """
    named = {"tenant_id": w.tenant, "title": w.tenant, "status": r.TICKET_STATUS_SOLVED}
    message = {"session_id": w.session, "role": r.CHAT_MESSAGE_ROLE_USER, "content": w.content}
    file, second = w.a_file(w.file), w.a_file(w.second)
    messages = {
        "new": r.ChatMessage(**message, attachments=[w.a_file()]),
        "repeat": r.ChatMessage(**message, id=w.message, attachments=[file, second]),
        "taken {}.id": r.ChatMessage(**message, id=w.deleted),
        "taken {}.attachments[0].id": r.ChatMessage(**message, attachments=[file]),
    }
    token = "of the second page"
    return {
        "CreateChatSession": {
            "repeat": sessions_pb.CreateChatSessionRequest(
                session=r.ChatSession(id=w.session, tenant_id=w.tenant)
            ),
        },
        "GetChatSession": {"": sessions_pb.GetChatSessionRequest(session_id=w.session)},
        "ListChatSessions": {
            "": sessions_pb.ListChatSessionsRequest(page_size=1, page_token=token)
        },
        "UpdateChatSession": {
            "": sessions_pb.UpdateChatSessionRequest(
                session=r.ChatSession(
                    id=w.session, tenant_id=w.tenant, status=r.CHAT_SESSION_STATUS_RESOLVED
                ),
                update_mask=FieldMask(paths=["status"]),
            )
        },
        "DeleteChatSession": {"": sessions_pb.DeleteChatSessionRequest(session_id=w.session)},
        "WatchChatSession": {"": sessions_pb.WatchChatSessionRequest(session_id=w.session)},
        "CreateChatMessage": {
            case.format("message"): messages_pb.CreateChatMessageRequest(
                session_id=w.session, message=new
            )
            for case, new in messages.items()
        },
        "BatchCreateChatMessages": {
            case.format("messages[0]"): messages_pb.BatchCreateChatMessagesRequest(
                session_id=w.session, messages=[new]
            )
            for case, new in messages.items()
        },
        "GetChatMessage": {"": messages_pb.GetChatMessageRequest(message_id=w.message)},
        "ListChatMessages": {"": messages_pb.ListChatMessagesRequest(session_id=w.session)},
        "UpdateChatMessage": {
            "": messages_pb.UpdateChatMessageRequest(
                message=r.ChatMessage(
                    id=w.message, session_id=w.session, metadata_json="{}", attachments=[file]
                ),
                update_mask=FieldMask(paths=["metadata_json"]),
            )
        },
        "DeleteChatMessage": {"": messages_pb.DeleteChatMessageRequest(message_id=w.message)},
        "SearchChatMessages": {
            "": messages_pb.SearchChatMessagesRequest(query="hello", page_size=1, page_token=token),
            "in a session": messages_pb.SearchChatMessagesRequest(
                query="hello", session_id=w.session
            ),
        },
        "CreateChatAttachment": {
            "repeat": files_pb.CreateChatAttachmentRequest(message_id=w.message, attachment=file),
        },
        "GetChatAttachment": {"": files_pb.GetChatAttachmentRequest(attachment_id=w.file)},
        "ListChatAttachments": {
            "of a message": files_pb.ListChatAttachmentsRequest(
                message_id=w.message, page_size=1, page_token=token
            ),
            "of a session": files_pb.ListChatAttachmentsRequest(
                session_id=w.session, page_size=1, page_token=token
            ),
        },
        "DeleteChatAttachment": {"": files_pb.DeleteChatAttachmentRequest(attachment_id=w.file)},
        "CreateChatTicket": {
            "new": tickets_pb.CreateChatTicketRequest(session_id=w.bare, ticket=r.Ticket(**named)),
            "existing": tickets_pb.CreateChatTicketRequest(session_id=w.bare, ticket_id=w.ticket),
            "repeat": tickets_pb.CreateChatTicketRequest(
                session_id=w.session, chat_ticket_id=w.link, ticket_id=w.ticket
            ),
            "repeat new": tickets_pb.CreateChatTicketRequest(
                session_id=w.session, ticket=r.Ticket(**named, id=w.ticket)
            ),
            "taken chat_ticket_id": tickets_pb.CreateChatTicketRequest(
                session_id=w.bare, chat_ticket_id=w.link, ticket_id=w.ticket
            ),
            "taken ticket.id": tickets_pb.CreateChatTicketRequest(
                session_id=w.bare, ticket=r.Ticket(**named, id=w.ticket)
            ),
        },
        "GetChatTicket": {"": tickets_pb.GetChatTicketRequest(chat_ticket_id=w.link)},
        "ListChatTickets": {
            # There is no second page of a session's.
            "of a session": tickets_pb.ListChatTicketsRequest(session_id=w.session),
            "of a ticket": tickets_pb.ListChatTicketsRequest(
                ticket_id=w.ticket, page_size=1, page_token=token
            ),
        },
        "DeleteChatTicket": {"": tickets_pb.DeleteChatTicketRequest(chat_ticket_id=w.link)},
        "GetTicket": {"": tickets_pb.GetTicketRequest(ticket_id=w.ticket)},
        "ListTickets": {"": tickets_pb.ListTicketsRequest(page_size=1, page_token=token)},
        "UpdateTicket": {
            "": tickets_pb.UpdateTicketRequest(
                ticket=r.Ticket(id=w.ticket, tenant_id=w.tenant, title="another"),
                update_mask=FieldMask(paths=["title"]),
            )
        },
        "DeleteTicket": {"": tickets_pb.DeleteTicketRequest(ticket_id=w.spare)},
    }


def id_fields(kind: Descriptor) -> Iterator[str]:
    """The paths of all ids that a message of this kind can carry."""
    for field in kind.fields:
        if field.message_type is not None:
            yield from (f"{field.name}.{path}" for path in id_fields(field.message_type))
        elif field.type in (field.TYPE_STRING, field.TYPE_BYTES) and field.name not in TEXTS:
            yield field.name


def ids_of(message: Message) -> dict[str, tuple[Message, str]]:
    """The ids that a message carries: path → the message that holds it, and the field there."""
    found: dict[str, tuple[Message, str]] = {}
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            parts = {field.name: value}
            if field.is_repeated:
                parts = {f"{field.name}[{index}]": part for index, part in enumerate(value)}
            for name, part in parts.items():
                found |= {f"{name}.{path}": place for path, place in ids_of(part).items()}
        elif field.type == FieldDescriptor.TYPE_STRING and field.name not in TEXTS:
            found[field.name] = (message, field.name)
    return found


CASES = [
    (rpc, case, path)
    for rpc, cases in calls(World("a tenant")).items()
    for case, request in cases.items()
    for path in ids_of(request)
    if not case.startswith("taken") or case == f"taken {path}"
]


def test_every_rpc_is_in_the_matrix() -> None:
    """Whoever adds an RPC says in `calls` what a call of it about one's own things is."""
    assert sorted(calls(World("a tenant"))) == sorted(rpc.name for rpc in RPCS)


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
def test_every_id_is_in_the_matrix(rpc: Any) -> None:
    """Whoever adds an id to a request says in `calls` what a tenant's own is."""
    tried = {re.sub(r"\[\d+\]", "", path) for name, _, path in CASES if name == rpc.name}
    assert tried == set(id_fields(rpc.input_type))


async def answer(api: Api, rpc: str, request: Message) -> tuple[StatusCode, list[str]]:
    """All that a call says, to its end or until a follower has caught up."""
    services = (api.sessions, api.messages, api.attachments, api.tickets)
    call = next(getattr(each, rpc) for each in services if hasattr(each, rpc))(request)
    said = []
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for response in call:
                said.append(MessageToJson(response, indent=None))
                if '"caughtUp"' in said[-1]:
                    call.cancel()
                    return StatusCode.OK, said
        else:
            said.append(MessageToJson(await call, indent=None))
    except grpc.aio.AioRpcError as error:
        said.append(error.details() or "")
    return await call.code(), [*said, *map(str, await call.trailing_metadata())]


async def request_of(api: Api, world: World, rpc: str, case: str, path: str) -> Any:
    """The request; with its page token, which binds its other fields, only to look at that."""
    request: Any = calls(world)[rpc][case]
    if "page_token" in ids_of(request):
        request.page_token = ""
        if path == "page_token":
            _, [first_page, *_] = await answer(api, rpc, request)
            request.page_token = json.loads(first_page)["nextPageToken"]
    return request


def of_nobody(path: str, value: str) -> str:
    """An id or a page token as good as this one, that nobody has been given."""
    if path != "page_token":
        return ID.sub(lambda _: an_id(), value)
    _, *position = json.loads(base64.urlsafe_b64decode(value + "=="))
    return base64.urlsafe_b64encode(json.dumps(["0" * 16, *position]).encode()).decode().rstrip("=")


@pytest.fixture(scope="module")
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def tables(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """Our tables, and their columns in order."""
    found = connection.execute("""
        SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position)
          FROM information_schema.columns JOIN information_schema.tables
               USING (table_schema, table_name)
         WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
           AND table_name <> 'schema_migrations'
         GROUP BY table_name
    """)
    return dict(found.fetchall())


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the database has of some tenants, seen by plain SQL."""

    connection: psycopg.Connection[Any]
    tables: dict[str, list[str]]

    def of(self, *tenants: str) -> list[str]:
        each = [
            sql.SQL(
                "SELECT {} || to_jsonb(t)::text FROM {} t WHERE tenant_id = ANY (%(of)s)"
            ).format(sql.Literal(f"{table} "), sql.Identifier(table))
            for table in self.tables
        ]
        found = self.connection.execute(sql.SQL(" UNION ALL ").join(each), {"of": list(tenants)})
        return sorted(row for (row,) in found)

    def delete(self, *tenants: str) -> None:
        for statement in (
            "UPDATE tickets SET status = 'closed' WHERE tenant_id = ANY (%s)",
            "DELETE FROM chat_sessions WHERE tenant_id = ANY (%s)",
            "DELETE FROM tickets WHERE tenant_id = ANY (%s)",
        ):
            self.connection.execute(statement, [list(tenants)])


@pytest.fixture
def rows(connection: psycopg.Connection[Any], tables: dict[str, list[str]]) -> Rows:
    return Rows(connection, tables)


def plain(lines: list[str], world: World | None = None) -> list[str]:
    """Without times and page tokens, and with no ids but those of a world and the one asked for."""
    known = (*dataclasses.astuple(world), PROBE) if world else ()
    text = NEXT_PAGE.sub("token", TIME.sub("time", "\n".join(lines)))
    return sorted(ID.sub(lambda found: found[0] if found[0] in known else "id", text).splitlines())


@pytest.mark.parametrize(
    ("rpc", "case", "path"), CASES, ids=["-".join(filter(None, case)) for case in CASES]
)
async def test_foreign_id_is_as_absent_and_own_id_is_not(
    api: Api, other: Api, rows: Rows, rpc: str, case: str, path: str
) -> None:
    """Another tenant's id gets the answer of an id of nobody's, and does what that does.

    Status, text, details, responses and our own rows are the same. Only with our own id the call
    is another one, unless it does not read that id. Their rows stay as they were, also when they
    have the very same ids.
    """
    ours, theirs = World(api.tenant), World(other.tenant)
    made: list[str] = []
    code: dict[str, StatusCode] = {}
    outcome: dict[str, list[str]] = {}
    for whose in ("absent", "foreign", "own"):
        # A token of theirs is one for the very same request; our own call has a twin to spare.
        if whose == "own" or path == "page_token":
            theirs = dataclasses.replace(ours, tenant=other.tenant)
        if not made or whose == "own" or rows.of(ours.tenant, theirs.tenant) != made:
            rows.delete(ours.tenant, theirs.tenant)
            await asyncio.gather(ours.make(api), theirs.make(other))
            made = rows.of(ours.tenant, theirs.tenant)
        request = await request_of(api, ours, rpc, case, path)
        value = ""
        if whose != "own":
            value = getattr(*ids_of(await request_of(other, theirs, rpc, case, path))[path])
            value = value if whose == "foreign" else of_nobody(path, value)
            setattr(*ids_of(request)[path], value)
        before = rows.of(theirs.tenant)
        code[whose], lines = await answer(api, rpc, request)
        assert rows.of(theirs.tenant) == before
        lines += rows.of(ours.tenant)
        if value:
            lines = [line.replace(value, PROBE) for line in lines]
        secret = {*dataclasses.astuple(theirs)} - {*dataclasses.astuple(ours)}
        assert not [line for line in lines if any(each in line for each in secret)]
        outcome[whose] = lines

    assert code["foreign"] == code["absent"]
    assert plain(outcome["foreign"], ours) == plain(outcome["absent"], ours)
    expected = StatusCode.ALREADY_EXISTS if case.startswith("taken") else StatusCode.OK
    assert code["own"] == expected, outcome["own"]
    assert path != "page_token" or code["foreign"] == StatusCode.INVALID_ARGUMENT
    holder, name = ids_of(request)[path]
    is_ignored = not IGNORED.isdisjoint([f"{holder.DESCRIPTOR.name}.{name}", f"{rpc} {path}"])
    assert (plain(outcome["own"]) == plain(outcome["absent"])) == is_ignored


# What starts like this is a statement; what does not is a part of one, or something else.
STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|TRUNCATE|COPY)\b")

STATEMENTS: dict[str, LiteralString] = {
    f"{module.name.removeprefix('chat_ticket_svc.')}.{name}": value
    for module in pkgutil.walk_packages(chat_ticket_svc.__path__, "chat_ticket_svc.")
    if not module.name.endswith("__main__")
    for name, value in vars(importlib.import_module(module.name)).items()
    if isinstance(value, str) and STATEMENT.match(value)
}

# Besides them, only this is sent.
OTHERS = {
    *("store.database.'BEGIN'", "store.database.'COMMIT'", "store.database.'ROLLBACK'"),
    *("store.database.'SELECT 1'", "watch.notifications.f'LISTEN {CHANNEL}'"),
    *("store.database.sql", "store.transaction.sql"),  # which are passed through
    "store.search.ESTIMATE",  # which reads none of them: it tells a plan
}
SENDERS = {
    "fetch_all",
    "fetch",
    "fetch_pipelined",
    "fetch_typed",
    "fetch_one",
    "write",
    "write_pipelined",
    "execute",
    "executemany",
    "stream",
    "copy",
}

# In a condition of a plan, and not as one side of an OR.
EQUAL = re.compile(
    r"(?<! OR )(?<! OR \()\((\$\d+|\w+\.tenant_id) = (\$\d+|\w+\.tenant_id)\)(?! OR )"
)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement_holds_every_table_to_the_tenant(
    rows: Rows, tables: dict[str, list[str]], statement: str
) -> None:
    """However PostgreSQL reads one of our tables, it is only the rows of the call's tenant.

    It says so in its plan: a condition on each scan's tenant_id, which is the parameter's or that
    of a table which is itself held to it. What is inserted is the tenant's of the parameter; or,
    for several tenants at once, of the row that it is inserted for.
    """
    names: list[str] = []

    def number(parameter: re.Match[str]) -> str:
        name = parameter[1] or str(len(names))
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    numbered = re.sub(r"%\((\w+)\)s|%s", number, STATEMENTS[statement])
    nulls = f"({', '.join('NULL' for _ in names)})" if names else ""
    for command in (
        "SET plan_cache_mode = force_generic_plan",
        f'PREPARE "{statement}" AS {numbered}',
        f'EXPLAIN (VERBOSE, FORMAT JSON) EXECUTE "{statement}"{nulls}',
    ):
        cursor = rows.connection.execute(command)
    [[[found]]] = cursor.fetchall()
    plan = list(nodes(found["Plan"]))
    ours = [node for node in plan if node.get("Relation Name") in tables]
    tenant = f"${names.index('tenant_id') + 1}" if "tenant_id" in names else "no parameter"

    scanned = {f"{node['Alias']}.tenant_id" for node in ours if "Scan" in node["Node Type"]}
    conditions = [
        str(each) for node in plan for key, each in node.items() if key.endswith(("Cond", "Filter"))
    ]
    held = {tenant}
    equal = [pair for condition in conditions for pair in EQUAL.findall(condition)]
    held |= {side for pair in equal for side in pair if "." in side} - scanned
    for _ in scanned:
        held |= {side for pair in equal if not held.isdisjoint(pair) for side in pair}
    assert scanned <= held

    for node in ours:
        if node.get("Operation") == "Insert":
            [source] = (each for each in node["Plans"] if each["Parent Relationship"] == "Outer")
            column = tables[node["Relation Name"]].index("tenant_id")
            assert source["Output"][column] in ({tenant} if "tenant_id" in names else held)


def choices(expression: ast.expr) -> Iterator[ast.expr]:
    """An expression, or both of the expressions of a choice."""
    if isinstance(expression, ast.IfExp):
        yield from (*choices(expression.body), *choices(expression.orelse))
    else:
        yield expression


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in PSYCOPG], ids=lambda path: path.stem
)
def test_only_these_statements_are_sent(path: Path) -> None:
    """What goes to PostgreSQL is a constant of its module, whole: no text is put together."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if any(getattr(function, "attr", "") in SENDERS for function in choices(node.func)):
            for argument in choices([*node.args, *(each.value for each in node.keywords)][0]):
                name = f"{module}.{ast.unparse(argument)}"
                assert name in STATEMENTS or name in OTHERS, f"line {node.lineno}"


FOREIGN_KEYS = """
SELECT conname, conrelid::regclass::text AS child, confrelid::regclass::text AS parent,
       array(SELECT ARRAY[c.attname, p.attname]::text[]
               FROM unnest(conkey, confkey) AS pair (child, parent)
               JOIN pg_attribute c ON c.attrelid = conrelid AND c.attnum = pair.child
               JOIN pg_attribute p ON p.attrelid = confrelid AND p.attnum = pair.parent)
  FROM pg_constraint
 WHERE contype = 'f' AND connamespace = 'public'::regnamespace
"""

UNIQUE_INDEXES = """
SELECT indrelid::regclass::text, indexrelid::regclass::text, indisprimary,
       array(SELECT attname::text FROM unnest(indkey) WITH ORDINALITY AS key (number, position)
               JOIN pg_attribute ON attrelid = indrelid AND attnum = number
              WHERE position <= indnkeyatts)
  FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
 WHERE indisunique AND relnamespace = 'public'::regnamespace
"""


class TestSchema:
    def test_every_key_holds_the_tenant(self, rows: Rows) -> None:
        """Of every table, in the primary key and every other unique one; on both sides of each FK.

        And it is never NULL, which would let a foreign key go unchecked.
        """
        execute = rows.connection.execute
        primary = set()
        for table, index, is_primary, columns in execute(UNIQUE_INDEXES).fetchall():
            if table in rows.tables:
                assert "tenant_id" in columns, index
                primary |= {table} if is_primary else set()
        assert primary == {*rows.tables}
        for name, _, _, pairs in execute(FOREIGN_KEYS).fetchall():
            assert ["tenant_id", "tenant_id"] in pairs, name

    def test_every_reference_is_a_foreign_key(self, rows: Rows) -> None:
        """But for the tombstone's, whose message is gone."""
        referring = {
            (table, column)
            for table, columns in rows.tables.items()
            for column in columns
            if column.endswith("_id") and column != "tenant_id"
        }
        keys = rows.connection.execute(FOREIGN_KEYS).fetchall()
        held = {(table, column) for _, table, _, pairs in keys for column, _ in pairs}
        assert referring - held == {("chat_message_tombstones", "message_id")}

    async def test_plain_sql_attaches_nothing_across_tenants(
        self, api: Api, other: Api, rows: Rows
    ) -> None:
        """No child of ours gets a parent of theirs, nor becomes theirs under a parent of ours."""
        ours, theirs = World(api.tenant), World(other.tenant)
        await asyncio.gather(ours.make(api), theirs.make(other))
        before = rows.of(ours.tenant, theirs.tenant)
        keys = rows.connection.execute(FOREIGN_KEYS).fetchall()
        assert keys
        for name, child, parent, pairs in keys:
            [(column, parent_id)] = (pair for pair in pairs if pair != ["tenant_id", "tenant_id"])
            of_theirs = sql.SQL("SELECT {} FROM {} WHERE tenant_id = %s LIMIT 1").format(
                sql.Identifier(parent_id), sql.Identifier(parent)
            )
            [foreign] = rows.connection.execute(of_theirs, [theirs.tenant]).fetchall()
            names = {"child": sql.Identifier(child), "column": sql.Identifier(column)}
            values = {"ours": ours.tenant, "theirs": theirs.tenant, "foreign": foreign[0]}
            with rows.connection.transaction(force_rollback=True):
                [[row]] = rows.connection.execute(sql.SQL(TAKE).format(**names), values).fetchall()
                values["row"] = Jsonb({**row, column: str(foreign[0])})
                with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught:
                    rows.connection.execute(sql.SQL(PUT).format(**names), values)
            assert caught.value.diag.constraint_name == name
            for update in (ATTACH, MOVE):
                with pytest.raises(psycopg.errors.IntegrityError):
                    rows.connection.execute(sql.SQL(update).format(**names), values)
        assert rows.of(ours.tenant, theirs.tenant) == before


TAKE = """
DELETE FROM {child} WHERE ctid = (SELECT ctid FROM {child} WHERE tenant_id = %(ours)s LIMIT 1)
RETURNING to_jsonb({child})
"""
PUT = "INSERT INTO {child} SELECT (jsonb_populate_record(NULL::{child}, %(row)s)).*"
ATTACH = "UPDATE {child} SET {column} = %(foreign)s WHERE tenant_id = %(ours)s"
MOVE = "UPDATE {child} SET tenant_id = %(theirs)s WHERE tenant_id = %(ours)s"
