"""`chat-ticket-svc tenant`: sets, and shows, what an operator has set for a tenant."""

import argparse
import shlex

from chat_ticket_svc import config
from chat_ticket_svc.commands import arguments
from chat_ticket_svc.commands.migrated_database import run_on_database
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.search_language import SEARCH_LANGUAGES
from chat_ticket_svc.store import tenant_settings
from chat_ticket_svc.store.database import Database

DEFAULT = "default"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    setting = actions.add_parser("set", help="set the search language of a tenant")
    arguments.add_required_tenant(setting, "the tenant")
    setting.add_argument(
        "--search-language",
        required=True,
        metavar="LANGUAGE",
        help="how messages without a language_code are stemmed: a language of"
        f" {config.variable('search_language')}, such as german; simple, which does not stem; or"
        " default, which is what that setting says",
    )
    setting.set_defaults(action=_set)
    showing = actions.add_parser("show", help="show the search language of a tenant")
    arguments.add_required_tenant(showing, "the tenant")
    showing.set_defaults(action=_show)


def run(options: argparse.Namespace) -> int:
    action = options.action
    return run_on_database(lambda db: action(db, options))


async def _set(db: Database, options: argparse.Namespace) -> int:
    language = options.search_language
    if language not in (*SEARCH_LANGUAGES, DEFAULT):
        known = ", ".join([*SEARCH_LANGUAGES, DEFAULT])
        raise ConfigurationError(f"--search-language: must be one of {known}")
    await tenant_settings.set_search_language(
        db, options.tenant, None if language == DEFAULT else language
    )
    await _show(db, options)
    print(
        "messages that are already there keep their language until chat-ticket-svc reindex"
        f" --tenant {shlex.quote(options.tenant)}"
    )
    return 0


async def _show(db: Database, options: argparse.Namespace) -> int:
    language = await tenant_settings.get_search_language(db, options.tenant)
    if language is not None:
        print(f"search language: {language}, of the tenant")
        return 0
    default = config.load().search_language
    print(f"search language: {default}, from {config.variable('search_language')}")
    return 0
