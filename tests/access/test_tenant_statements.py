"""Every SQL statement of the service reads and writes the rows of the call's tenant alone."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import pytest
from support.source_tree import FILES, PSYCOPG, ROOT, room
from support.tenant_rows import TenantRows

import chat_ticket_svc

# What starts like this is a statement; what does not is a part of one, or something else.
STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|TRUNCATE|COPY)\b")


STATEMENTS: dict[str, LiteralString] = {
    f"{module.name.removeprefix('chat_ticket_svc.')}.{name}": value
    for module in pkgutil.walk_packages(chat_ticket_svc.__path__, "chat_ticket_svc.")
    if not module.name.endswith("__main__")
    for name, value in vars(importlib.import_module(module.name)).items()
    if isinstance(value, str) and STATEMENT.match(value)
}


# What an operator's command, who finishes lost drafts and who sweeps ask about all tenants.
OF_ALL_TENANTS = {
    *("store.tenants.NEXT_TENANT", "store.draft_expiry.EXPIRED"),
    "store.tombstone_sweep.SWEEP",
}


# Besides them, only this is sent.
OTHERS = {
    "store.database.'BEGIN ISOLATION LEVEL READ COMMITTED'",
    "store.database.'BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY'",
    *("store.database.'COMMIT'", "store.database.'ROLLBACK'"),
    "store.database.'SELECT 1'",
    "watch.notifications.f'LISTEN {CHANNEL}; LISTEN {DRAFT_CHANNEL}'",
    *("store.database.sql", "store.transaction.sql"),  # which are passed through
    "store.search.ESTIMATE",  # which reads no table: it returns a plan
    *("store.search_index.BUILD", "store.search_index.DROP[name]"),
    *("store.search_index.DROP[INDEX]", "store.search_index.DROP[NEW_INDEX]"),
    *("store.search_index.DROP[OLD_INDEX]", "store.search_index.DROP[STALE_INDEX]"),
    *("store.search_index.KEEP_OLD", "store.search_index.SET_ASIDE"),
    *("store.search_index.USE_NEW", "store.search_index.NOTE_VERSION"),
    "store.search_index.'ANALYZE chat_messages'",
    "store.trial_write.statement",  # for a tenant of its own, and rolled back
}


SENDERS = {
    "fetch_all",
    "fetch",
    "fetch_pipelined",
    "fetch_typed",
    "fetch_by_key",
    "fetch_one",
    "write",
    "write_pipelined",
    "execute",
    "executemany",
    "stream",
    "copy",
}


# In a condition of a plan, and not as one side of an OR. A parameter that takes the collation of a
# column is shown with a cast.
SIDE = r"\(?(\$\d+|\w+\.tenant_id)(?:\)::text)?"
EQUAL = re.compile(rf"(?<! OR )(?<! OR \()\({SIDE} = {SIDE}\)(?! OR )")


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.mark.parametrize("statement", sorted(STATEMENTS.keys() - OF_ALL_TENANTS))
def test_statement_reads_only_rows_of_the_tenant(
    rows: TenantRows, tables: dict[str, list[str]], statement: str
) -> None:
    """Whenever PostgreSQL reads a table, it reads only rows of the call's tenant.

    It says so in its plan: a condition on each scan's tenant_id, which is the parameter's or that
    of a table which is itself bound to it. What is inserted is the tenant's of the parameter; or,
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
    bound = {tenant}
    equal = [pair for condition in conditions for pair in EQUAL.findall(condition)]
    bound |= {side for pair in equal for side in pair if "." in side} - scanned
    for _ in scanned:
        bound |= {side for pair in equal if not bound.isdisjoint(pair) for side in pair}
    # The rows of a WITH query are the same wherever it is read.
    for query in {node["CTE Name"] for node in plan if "CTE Name" in node}:
        same = {f"{node['Alias']}.tenant_id" for node in plan if node.get("CTE Name") == query}
        bound |= same if not bound.isdisjoint(same) else set()
    assert scanned <= bound

    for node in ours:
        if node.get("Operation") == "Insert":
            [source] = (each for each in node["Plans"] if each["Parent Relationship"] == "Outer")
            column = tables[node["Relation Name"]].index("tenant_id")
            assert source["Output"][column] in ({tenant} if "tenant_id" in names else bound)


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
    """Every statement is a constant, of its module or of one beside it: none is composed."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if any(getattr(function, "attr", "") in SENDERS for function in choices(node.func)):
            for argument in choices([*node.args, *(keyword.value for keyword in node.keywords)][0]):
                name = f"{module}.{ast.unparse(argument)}"
                beside = f"{module.rpartition('.')[0]}.{ast.unparse(argument)}"
                assert {name, beside} & STATEMENTS.keys() or name in OTHERS, f"line {node.lineno}"
