-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

ALTER TABLE chat_sessions
    -- The caller's own id of the person whose chat it is. In the order of its bytes, as no version of
    -- a library changes that: an index that has lost its order would miss sessions of a person.
    ADD COLUMN user_id text COLLATE "C",
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

-- A session does not pass from one person to another, and does not take the id of a deleted one.
CREATE TRIGGER chat_sessions_refuse_key_change
    BEFORE UPDATE OF id, user_id ON chat_sessions
    FOR EACH ROW WHEN ((OLD.id, OLD.user_id) IS DISTINCT FROM (NEW.id, NEW.user_id))
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

-- migrate:down

DROP TRIGGER chat_sessions_check_labels ON chat_sessions;
DROP TRIGGER chat_sessions_refuse_key_change ON chat_sessions;
DROP TRIGGER chat_sessions_check_title_update ON chat_sessions;
DROP TRIGGER chat_sessions_check_title_insert ON chat_sessions;
DROP TRIGGER chat_sessions_check_user_id_insert ON chat_sessions;
DROP FUNCTION refuse_bad_labels();
ALTER TABLE chat_sessions
    DROP CONSTRAINT chat_sessions_title_check,
    DROP CONSTRAINT chat_sessions_user_id_check,
    DROP COLUMN labels,
    DROP COLUMN title,
    DROP COLUMN user_id;
