-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- The text search configuration of a language, such as german. It is looked up by name, and no
-- column has the type regconfig, which would stop pg_upgrade.
CREATE FUNCTION search_configuration(language text) RETURNS regconfig
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN
    RETURN ('pg_catalog.' || quote_ident(language))::regconfig;
END
$$;

-- Rewrites text so that PostgreSQL's parser finds plain words and whole numbers in it, and nothing
-- else: no tags, URLs, e-mail addresses, file names, hyphenated words or decimal fractions, which it
-- would index as a whole or leave out. docs/guides/search.md has the rules.
CREATE FUNCTION search_text(content text, language text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    line  text := content;
    parts text[];
    part  text;
    -- Scripts without spaces: Thai, Lao, Tibetan, Burmese, Hangul, Khmer, kana, Han. From U+3005 on
    -- there are few others, and pairs suit them too. Marks belong to the letter before them.
    marks CONSTANT text :=
        '\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u0f18\u0f19\u0f35\u0f37'
        '\u0f39\u0f3e\u0f3f\u0f71-\u0f84\u0f86\u0f87\u0f8d-\u0fbc\u102b-\u103e\u1056-\u1059'
        '\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d\u108f\u109a-\u109d'
        '\u17b6-\u17d3\u17dd\u302a-\u302f\u3099\u309a';
    characters CONSTANT text := '\u0e01-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\U0010ffff';
    -- The letters of all other scripts, when punctuation is gone.
    letters CONSTANT text := 'A-Za-z\u0080-\u0e00\u10a0-\u10ff\u1200-\u177f\u1800-\u3004';
BEGIN
    IF octet_length(line) <> char_length(line) THEN
        -- What normalization would join to the word before it.
        line := regexp_replace(line,
            '[\u2120\u2122]|(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])'
            '|(?<=[A-Za-z]{3})(?=[\u00b2\u00b3\u00b9\u2070-\u2079])', ' ', 'g');
        -- Normalization takes time by the square of the marks in a row, and cannot be interrupted.
        -- So it is done in parts where so many characters in a row might all be marks.
        parts := ARRAY[line];
        IF line ~ '[^\u0001-\u007f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff]{129}' THEN
            parts := string_to_array(
                regexp_replace(translate(line, E'\u0001', ' '),
                    '([^\u0001-\u007f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff]{128})',
                    E'\\1\u0001', 'g'),
                E'\u0001');
        END IF;
        line := '';
        FOREACH part IN ARRAY parts LOOP
            IF part IS NOT NFKC NORMALIZED THEN
                part := normalize(part, NFKC);
            END IF;
            -- Accents, vowel points, and letters that have their own place in few languages. The
            -- other languages' stemmers know their own.
            IF language IN ('english', 'simple')
               AND part ~ '[\u00c0-\u024f\u0300-\u03ff\u0591-\u05c7\u064b-\u0670\u1e00-\u1fff]'
            THEN
                part := regexp_replace(normalize(part, NFD),
                    '(?<=[A-Za-z\u0370-\u03ff])[\u0300-\u036f]+'
                    '|[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670]+',
                    '', 'g');
                part := normalize(
                    replace(replace(replace(translate(part, 'đĐłŁøØıς', 'dDlLoOiσ'),
                        'ß', 'ss'), 'æ', 'ae'), 'œ', 'oe'), NFC);
            END IF;
            line := line || part;
        END LOOP;
        -- What is invisible: soft hyphens, joiners, directions, variation selectors, fillers, tags;
        -- and Armenian marks that stand within a word.
        line := regexp_replace(line,
            '[\u00ad\u034f\u055b-\u055e\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f'
            '\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]+', '', 'g');
        -- Punctuation and symbols. Some locales count every character that is not ASCII as a letter.
        line := regexp_replace(line,
            '[\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u0e2f\u0e3f\u0e4f'
            '\u0e5a\u0e5b\u0f01-\u0f17\u0f1a-\u0f1f\u0f34\u0f36\u0f38\u0f3a-\u0f3d\u0f85'
            '\u0fbe-\u0fff\u104a-\u104f\u17d4-\u17d6\u17d8-\u17db\u2000-\u206f\u20a0-\u20ff'
            '\u2190-\u2bff\u2e00-\u2e7f\u3000-\u3004\u3008-\u3020\u3030\u3036\u3037\u303d-\u3040'
            '\u309b\u309c\u30a0\u30fb\ufd3e\ufd3f\ufe10-\ufe6f\uff00-\uff65\ufffc\ufffd'
            '\U0001f000-\U0001faff]+', ' ', 'g');
        -- Each character together with the next one, and the last one alone.
        IF line ~ ('[' || characters || ']') THEN
            line := regexp_replace(line, '([' || characters || ']+)', ' \1 ', 'g');
            line := regexp_replace(line,
                CASE WHEN line ~ ('[' || marks || ']')
                    THEN '(?<=[' || characters || '])((?![' || marks || '])[' || characters || ']'
                         '[' || marks || ']*)'
                    ELSE '(?<=[' || characters || '])([' || characters || '])'
                END, '\1 \1', 'g');
        END IF;
    END IF;
    -- "C++" and "C#" are other words than "C". The two letters look like their signs.
    IF line ~ '[A-Za-z](#|\+\+)' THEN
        line := regexp_replace(line, '(?<=[A-Za-z])#(?![A-Za-z])', E' \u2d4c ', 'g');
        line := regexp_replace(line, '(?<=[A-Za-z])\+\+(?!\+)', E' \u1429\u1429 ', 'g');
    END IF;
    -- The escapes of URLs, and what joins words.
    line := regexp_replace(line, '(%[0-9A-Fa-f]{2}|[<&./@+_~-])+', ' ', 'g');
    -- Parts of words with digits. "iPhone15" is found by "iphone" and "15", "30GB" by "30" and "gb",
    -- "1Z999AA10123" by "10123", and a timestamp by its date and time.
    IF line ~ ('[' || letters || '][0-9]|[0-9][' || letters || ']') THEN
        line := regexp_replace(line,
            '(?<=[0-9]{4} [0-9]{2} [0-9]{2})[Tt](?![A-Za-z])', ' ', 'g');
        line := regexp_replace(line,
            '(?<![0-9' || letters || '])([' || letters || ']+)([0-9]+)(?![0-9' || letters || '])',
            '\1\2 \1 \2', 'g');
        line := regexp_replace(line,
            '(?<![0-9' || letters || '])([0-9]+)([' || letters || ']+)(?![0-9' || letters || '])',
            '\1 \2 \1\2', 'g');
        line := regexp_replace(line,
            '(?<![0-9' || letters || '])([0-9' || letters || ']*[0-9][' || letters || ']+)([0-9]+)'
            '(?![0-9' || letters || '])',
            '\1\2 \2', 'g');
        line := regexp_replace(line,
            '(?<![0-9' || letters || '])([0-9]+)([' || letters || ']+[0-9][0-9' || letters || ']*)'
            '(?![0-9' || letters || '])',
            '\1 \1\2', 'g');
    END IF;
    -- A tsvector has room for 1 MiB. Text takes at most 1.6 times its length there.
    IF octet_length(line) > 640000 THEN
        line := left(line, 160000);
    END IF;
    RETURN line;
END
$$;

-- The words of a message, stemmed in its language: what the index holds and what a search asks for.
-- Most messages are English and have nothing to rewrite: they are spared the other functions.
CREATE FUNCTION search_vector(content text, language text) RETURNS tsvector
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN to_tsvector(
        CASE language
            WHEN 'english' THEN 'pg_catalog.english'::regconfig
            ELSE search_configuration(language)
        END,
        CASE
            WHEN octet_length(content) = char_length(content)
                 AND content !~ '[<&/@+~]|[._-][._0-9A-Za-z]|[A-Za-z][0-9#]|[0-9][A-Za-z]|%[0-9A-Fa-f]'
            THEN content
            ELSE search_text(content, language)
        END
    );

-- language_code is what the caller said, a BCP 47 tag. search_language is the text search
-- configuration that indexes the message. An older server leaves both out: it indexes English.
ALTER TABLE chat_messages
    ADD COLUMN language_code text,
    ADD COLUMN search_language text NOT NULL DEFAULT 'english',
    -- Not validated, which would read the whole table: no row has one yet.
    ADD CONSTRAINT chat_messages_language_code_check
        CHECK (language_code ~ '^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$'
               AND char_length(language_code) <= 35) NOT VALID;

-- What an operator sets for one tenant. A tenant without a row, or with a null, has the setting of the
-- service. Its tenant_id is ordered as everywhere (see set_tenant_collation).
DO $$
DECLARE
    collation_name text := (
        SELECT quote_ident(nspname) || '.' || quote_ident(collname)
          FROM pg_attribute a
          JOIN pg_collation c ON c.oid = a.attcollation
          JOIN pg_namespace n ON n.oid = c.collnamespace
         WHERE attrelid = 'chat_sessions'::regclass AND attname = 'tenant_id'
    );
BEGIN
    EXECUTE format($table$
        CREATE TABLE tenant_settings (
            tenant_id       text COLLATE %s NOT NULL,
            search_language text,
            updated_at      timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT tenant_settings_pkey PRIMARY KEY (tenant_id),
            CONSTRAINT tenant_settings_search_language_check CHECK (
                search_language IS NULL OR search_configuration(search_language) IS NOT NULL)
        )
    $table$, collation_name);
END
$$;

-- Whoever may use the sessions may use the settings: a role that serves does not own the tables.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT privilege_type,
               CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END AS role,
               CASE WHEN bool_or(is_grantable) THEN ' WITH GRANT OPTION' ELSE '' END AS option
          FROM pg_class AS sessions,
               aclexplode(coalesce(relacl, acldefault('r', relowner)))
         WHERE sessions.oid = 'chat_sessions'::regclass
           AND grantee <> (SELECT relowner FROM pg_class WHERE oid = 'tenant_settings'::regclass)
         GROUP BY grantee, privilege_type
    LOOP
        EXECUTE format('GRANT %s ON tenant_settings TO %s%s',
                       granted.privilege_type, granted.role, granted.option);
    END LOOP;
END
$$;

-- As before, and for the settings too.
CREATE OR REPLACE FUNCTION set_tenant_collation(collation_name text) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    changed regclass;
BEGIN
    -- PostgreSQL changes no column that a trigger names.
    DROP TRIGGER chat_messages_refuse_key_change ON chat_messages;
    DROP TRIGGER chat_tickets_refuse_key_change ON chat_tickets;
    FOREACH changed IN ARRAY ARRAY[
        'chat_sessions', 'chat_messages', 'chat_message_tombstones', 'chat_attachments',
        'tickets', 'chat_tickets', 'tenant_settings'
    ]::regclass[] LOOP
        EXECUTE format(
            'ALTER TABLE %s ALTER COLUMN tenant_id TYPE text COLLATE %I', changed, collation_name
        );
    END LOOP;
    CREATE TRIGGER chat_messages_refuse_key_change
        BEFORE UPDATE OF id, tenant_id, session_id, sequence ON chat_messages
        FOR EACH ROW
        WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.sequence)
              IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.sequence))
        EXECUTE FUNCTION refuse_key_change();
    CREATE TRIGGER chat_tickets_refuse_key_change
        BEFORE UPDATE OF id, tenant_id, session_id, ticket_id ON chat_tickets
        FOR EACH ROW
        WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.ticket_id)
              IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.ticket_id))
        EXECUTE FUNCTION refuse_key_change();
END
$$;

-- An empty table gets the new index at once. Elsewhere `chat-ticket-svc migrate` builds it
-- concurrently, when this migration is committed: writes go on. Until every server is a new one, the
-- old index stays beside it, as the search of old servers asks for its expression.
-- The comment says whose stemmers the words are of: pg_upgrade brings others and keeps the index.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM chat_messages) THEN
        DROP INDEX idx_chat_messages_content;
        CREATE INDEX idx_chat_messages_content ON chat_messages
            USING gin (tenant_id, search_vector(content, search_language))
            WITH (gin_pending_list_limit = 512);
        EXECUTE format('COMMENT ON INDEX idx_chat_messages_content IS %L', 'built by PostgreSQL '
                       || current_setting('server_version_num')::integer / 10000);
    END IF;
END
$$;

-- migrate:down

-- The languages of the messages and the settings of the tenants are lost.
DO $$
DECLARE
    -- Of the schema of the table: a later one in the search_path may have the same names.
    index_name text := (SELECT relnamespace::regnamespace || '.idx_chat_messages_content'
                          FROM pg_class WHERE oid = 'chat_messages'::regclass);
BEGIN
    EXECUTE format('DROP INDEX IF EXISTS %1$s_new, %1$s_stale', index_name);
    -- One whose concurrent drop was interrupted is invalid.
    IF EXISTS (SELECT FROM pg_index
                WHERE indexrelid = to_regclass(index_name || '_old') AND indisvalid)
    THEN
        EXECUTE format('DROP INDEX IF EXISTS %s', index_name);
        EXECUTE format('ALTER INDEX %s_old RENAME TO idx_chat_messages_content', index_name);
        RETURN;
    END IF;
    EXECUTE format('DROP INDEX IF EXISTS %s_old', index_name);
    IF pg_get_indexdef(to_regclass(index_name)) NOT LIKE '%search_vector(%' THEN
        RETURN;
    END IF;
    EXECUTE format('DROP INDEX IF EXISTS %s', index_name);
    CREATE INDEX idx_chat_messages_content ON chat_messages
        USING gin (tenant_id, to_tsvector('english', content))
        WITH (gin_pending_list_limit = 512);
END
$$;
DROP TABLE tenant_settings;
ALTER TABLE chat_messages
    DROP CONSTRAINT chat_messages_language_code_check,
    DROP COLUMN search_language,
    DROP COLUMN language_code;
DROP FUNCTION search_vector(text, text);
DROP FUNCTION search_text(text, text);
DROP FUNCTION search_configuration(text);

CREATE OR REPLACE FUNCTION set_tenant_collation(collation_name text) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    changed regclass;
BEGIN
    -- PostgreSQL changes no column that a trigger names.
    DROP TRIGGER chat_messages_refuse_key_change ON chat_messages;
    DROP TRIGGER chat_tickets_refuse_key_change ON chat_tickets;
    FOREACH changed IN ARRAY ARRAY[
        'chat_sessions', 'chat_messages', 'chat_message_tombstones', 'chat_attachments',
        'tickets', 'chat_tickets'
    ]::regclass[] LOOP
        EXECUTE format(
            'ALTER TABLE %s ALTER COLUMN tenant_id TYPE text COLLATE %I', changed, collation_name
        );
    END LOOP;
    CREATE TRIGGER chat_messages_refuse_key_change
        BEFORE UPDATE OF id, tenant_id, session_id, sequence ON chat_messages
        FOR EACH ROW
        WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.sequence)
              IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.sequence))
        EXECUTE FUNCTION refuse_key_change();
    CREATE TRIGGER chat_tickets_refuse_key_change
        BEFORE UPDATE OF id, tenant_id, session_id, ticket_id ON chat_tickets
        FOR EACH ROW
        WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.ticket_id)
              IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.ticket_id))
        EXECUTE FUNCTION refuse_key_change();
END
$$;
