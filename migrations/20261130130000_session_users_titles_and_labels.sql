-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

ALTER TABLE chat_sessions
    -- The caller's own id of the person whose chat it is.
    ADD COLUMN user_id text,
    ADD COLUMN title   text,
    -- Pairs of text. NULL means none.
    ADD COLUMN labels  jsonb,
    -- Not validated, which would read the whole table: no row has any of them yet.
    ADD CONSTRAINT chat_sessions_user_id_check
        CHECK (user_id <> '' AND char_length(user_id) <= 255) NOT VALID,
    ADD CONSTRAINT chat_sessions_title_check CHECK (title <> '') NOT VALID;

-- The rules of the service for text of one line, as for the titles of tickets.
CREATE TRIGGER chat_sessions_check_user_id_insert BEFORE INSERT ON chat_sessions
    FOR EACH ROW WHEN (NEW.user_id !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('user_id');

CREATE TRIGGER chat_sessions_check_title_insert BEFORE INSERT ON chat_sessions
    FOR EACH ROW WHEN (NEW.title !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('title');

CREATE TRIGGER chat_sessions_check_title_update BEFORE UPDATE OF title ON chat_sessions
    FOR EACH ROW
    WHEN (NEW.title IS DISTINCT FROM OLD.title AND NEW.title !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('title');

-- A session does not pass from one person to another.
CREATE TRIGGER chat_sessions_refuse_user_change
    BEFORE UPDATE OF user_id ON chat_sessions
    FOR EACH ROW WHEN (OLD.user_id IS DISTINCT FROM NEW.user_id)
    EXECUTE FUNCTION refuse_key_change();

-- A trigger and not a constraint: each message updates the row of its session, and PostgreSQL would
-- judge the labels anew each time.
CREATE FUNCTION refuse_bad_labels() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF jsonb_typeof(NEW.labels) <> 'object'
       OR NEW.labels = '{}'
       OR (SELECT count(*) FROM jsonb_object_keys(NEW.labels)) > 32
       OR EXISTS (
           SELECT FROM jsonb_each(NEW.labels) AS label
            WHERE label.key !~ '^[a-z0-9._/-]{1,63}$'
               OR jsonb_typeof(label.value) <> 'string'
               OR char_length(label.value #>> '{}') > 255
               OR label.value #>> '{}' ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]'
       )
    THEN
        RAISE 'labels are not 1 to 32 pairs of a key and a text'
            USING ERRCODE = 'invalid_parameter_value', TABLE = 'chat_sessions', COLUMN = 'labels',
                  CONSTRAINT = 'chat_sessions_labels_check';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER chat_sessions_check_labels BEFORE INSERT OR UPDATE OF labels ON chat_sessions
    FOR EACH ROW WHEN (NEW.labels IS NOT NULL) EXECUTE FUNCTION refuse_bad_labels();

-- What the index below has for a session: each label together with the tenant. So PostgreSQL knows
-- how often a label is set in this tenant, and a rare one is found without reading the others'.
CREATE FUNCTION label_pairs(tenant_id text, labels jsonb) RETURNS text[]
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN (SELECT array_agg(tenant_id || chr(1) || label.key || '=' || label.value)
              FROM jsonb_each_text(labels) AS label);

-- None of these keeps an append from a HOT update: messages change no column that they name.
-- Writes wait while they are built, under a second for a million sessions, as no row is in them.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_chat_sessions_user ON chat_sessions (tenant_id, user_id, created_at, id)
    WHERE user_id IS NOT NULL;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_chat_sessions_labels ON chat_sessions
    USING gin (label_pairs(tenant_id COLLATE "C", labels)) WITH (fastupdate = off)
    WHERE labels IS NOT NULL;

-- migrate:down

DROP INDEX idx_chat_sessions_labels;
DROP INDEX idx_chat_sessions_user;
DROP TRIGGER chat_sessions_check_labels ON chat_sessions;
DROP TRIGGER chat_sessions_refuse_user_change ON chat_sessions;
DROP TRIGGER chat_sessions_check_title_update ON chat_sessions;
DROP TRIGGER chat_sessions_check_title_insert ON chat_sessions;
DROP TRIGGER chat_sessions_check_user_id_insert ON chat_sessions;
DROP FUNCTION label_pairs(text, jsonb);
DROP FUNCTION refuse_bad_labels();
ALTER TABLE chat_sessions
    DROP CONSTRAINT chat_sessions_title_check,
    DROP CONSTRAINT chat_sessions_user_id_check,
    DROP COLUMN labels,
    DROP COLUMN title,
    DROP COLUMN user_id;
