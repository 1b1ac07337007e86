"""The language code of a message, and the search language that the message gets by it."""

import asyncio
from typing import Any

import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.database import execute
from support.messages import (
    batches,
    create_batch,
    get_message,
    sequences,
    set_metadata,
    user_message,
)
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, UpdateChatMessageRequest
from chat_ticket_svc import config
from chat_ticket_svc.search_language import SEARCH_LANGUAGES

LONGEST = "de-" + "-".join(["abcdefg"] * 4)


def search_languages(database: str, tenant: str) -> list[str]:
    """The search languages of a tenant's messages, oldest first."""
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT search_language FROM chat_messages WHERE tenant_id = %s ORDER BY sequence",
            [tenant],
        ).fetchall()
    return [language for (language,) in rows]


def set_tenant_language(database: str, tenant: str, language: str) -> None:
    execute(
        database,
        "INSERT INTO tenant_settings (tenant_id, search_language)"
        f" VALUES ('{tenant}', '{language}')"
        " ON CONFLICT (tenant_id) DO UPDATE SET search_language = EXCLUDED.search_language",
    )


class TestStored:
    async def test_code_is_returned_as_sent(self, api: Api) -> None:
        """By each way to create a message and each way to read one. Absent is empty."""
        assert len(LONGEST) == 34
        codes = ["", "de", "PT-br", "zh-Hant-TW", "tlh", LONGEST + "x", "de-1996-x-a"]
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            for code in codes:
                message = await api.message(session.id, language_code=code)
                assert message.language_code == code
            attached = await api.message(session.id, language_code="fr", attachments=[a_file()])
            await create_batch(
                api, session.id, [user_message("x", language_code=code) for code in codes]
            )
            updated = await set_metadata(api, attached.id, "{}")
            assert updated.language_code == "fr"

            listed = [
                message for page in await batches(api, session.id) for message in page.messages
            ]
            assert [message.language_code for message in listed] == [*codes, "fr", *codes]
            for message in listed:
                assert await get_message(api, message.id) == message
            await watcher.until_revision(len(listed) + 1)
            await assert_same_state(api, watcher, session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            await assert_same_state(api, watcher, session.id)

    async def test_messages_of_one_statement_keep_their_own(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """Messages of many callers are appended together."""
        session = await api.session()
        codes = ["", "de", "", "fr-CA", "ja", ""]
        created = await asyncio.gather(
            *(api.message(session.id, language_code=code) for code in codes)
        )
        assert [message.language_code for message in created] == codes
        in_order = [m.language_code for m in sorted(created, key=lambda m: m.sequence)]
        meant = {"": "english", "de": "german", "fr-CA": "french", "ja": "simple"}
        assert search_languages(database, tenant) == [meant[code] for code in in_order]

    async def test_repeat_has_the_same_code(self, api: Api) -> None:
        """A create that is repeated with another code, or without one, is another message."""
        session = await api.session()
        for code, others in (("de", ["", "DE", "fr"]), ("", ["en"])):
            sent: dict[str, Any] = {"id": an_id(), "language_code": code}
            stored = await api.message(session.id, **sent)
            changed = await set_metadata(api, stored.id, "{}")
            assert await api.message(session.id, **sent) == changed
            for other in others:
                with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
                    await api.message(session.id, **sent | {"language_code": other})

        batch = [user_message("x", id=an_id(), language_code=code) for code in ("de", "fr")]
        created = await create_batch(api, session.id, batch)
        assert await create_batch(api, session.id, batch) == created
        batch[1].language_code = "de"
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
            await create_batch(api, session.id, batch)
        assert refusal.info.metadata["index"] == "1"


class TestRejected:
    async def test_invalid_codes(self, api: Api) -> None:
        """Every one is reported, with its path. Nothing is stored."""
        session = await api.session()
        malformed = [
            *("d", "x-klingon", "de_AT", "de-", "-de", "de--AT", "abcdefghi", "de-abcdefghi"),
            *("d\u00e9", "d\u0435", "de\n", " de", "de\0", "\0"),
        ]
        messages = [user_message("x", language_code=code) for code in [*malformed, "de", ""]]
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, messages)
        assert refusal.fields == {
            f"messages[{index}].language_code": "not a BCP 47 language tag such as de-AT"
            for index in range(len(malformed))
        }
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.CreateChatMessage(
                CreateChatMessageRequest(
                    session_id=session.id,
                    message=user_message("x", language_code=LONGEST + "xy"),
                )
            )
        assert refusal.fields == {"message.language_code": "36 characters, at most 35"}
        assert await sequences(api, session.id) == []

    async def test_update(self, api: Api) -> None:
        """The code is immutable."""
        session = await api.session()
        message = await api.message(session.id, language_code="de")
        request = UpdateChatMessageRequest(
            message=r.ChatMessage(id=message.id, language_code="fr"),
            update_mask=FieldMask(paths=["language_code"]),
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.UpdateChatMessage(request)
        assert refusal.fields == {
            "update_mask": "path 'language_code' cannot be updated, only: metadata_json"
        }
        assert await get_message(api, message.id) == message


class TestSearchLanguage:
    """What is stored is the name of a text search configuration, and stays."""

    async def test_language_subtag_chooses_it(self, api: Api, database: str, tenant: str) -> None:
        """In any case, whatever follows it. A language without a configuration is not stemmed."""
        meant = {
            "german": ["de", "DE-at", "deu"],
            "norwegian": ["nb", "nn-NO", "no", "nob"],
            "serbian": ["sr-Latn-RS"],
            "english": ["en-x-de"],
            "simple": ["dea", "ja", "zh-Hant", "und", "german"],
        }
        codes = [code for language in meant for code in meant[language]]
        session = await api.session()
        await create_batch(
            api, session.id, [user_message("x", language_code=code) for code in codes]
        )
        for code in codes:
            await api.message(session.id, language_code=code)
        languages = [language for language in meant for _ in meant[language]]
        assert search_languages(database, tenant) == languages * 2

    async def test_tenant_chooses_it_for_messages_without_a_code(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """As it is when they are created. Without a choice, it is that of the service."""
        session = await api.session()

        async def create_in_each_way() -> None:
            await api.message(session.id)
            await api.message(session.id, attachments=[a_file()])
            await create_batch(
                api, session.id, [user_message("x"), user_message("x", language_code="it")]
            )

        await create_in_each_way()
        set_tenant_language(database, f"other {tenant}", "french")
        set_tenant_language(database, tenant, "german")
        await create_in_each_way()
        execute(
            database,
            f"UPDATE tenant_settings SET search_language = NULL WHERE tenant_id = '{tenant}'",
        )
        await create_in_each_way()
        assert search_languages(database, tenant) == [
            *("english", "english", "english", "italian"),
            *("german", "german", "german", "italian"),
            *("english", "english", "english", "italian"),
        ]

    async def test_setting_chooses_it_for_the_other_tenants(
        self, start_server: Any, database: str, tenant: str
    ) -> None:
        """It ranks after the code of the message and the language of the tenant."""
        api = await start_server(database, search_language="spanish")
        session = await api.session()
        await api.message(session.id)
        await create_batch(api, session.id, [user_message("x")])
        set_tenant_language(database, tenant, "simple")
        await api.message(session.id)
        await api.message(session.id, language_code="en")
        assert search_languages(database, tenant) == ["spanish", "spanish", "simple", "english"]

    def test_each_is_a_configuration_of_postgresql(self, database: str) -> None:
        """Words are stemmed by what PostgreSQL itself has, not by what somebody created."""
        with psycopg.connect(database) as connection:
            rows = connection.execute(
                "SELECT search_configuration(language)::text  FROM unnest(%s::text[]) AS language",
                [list(SEARCH_LANGUAGES)],
            ).fetchall()
        assert [name for (name,) in rows] == list(SEARCH_LANGUAGES)
        assert len(SEARCH_LANGUAGES) == 29

    @pytest.mark.parametrize("language", ["klingon", "German", "de", "pg_catalog.german"])
    def test_setting_is_one_of_them(self, language: str) -> None:
        """The error names all of them, and not the value."""
        with pytest.raises(config.ConfigurationError) as caught:
            config.load(search_language=language)
        names = ", ".join(SEARCH_LANGUAGES)
        assert str(caught.value) == f"CHAT_TICKET_SEARCH_LANGUAGE: must be one of {names}"
