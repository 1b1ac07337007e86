-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

ALTER TABLE chat_messages
    -- Who wrote it: the kind of author, and the caller's own id of the person or program.
    ADD COLUMN author_kind text,
    ADD COLUMN author_id   text,
    -- Whether its content was taken away. That is for ever.
    ADD COLUMN redacted    boolean NOT NULL DEFAULT false,
    -- Not validated, which would read the whole table: no row has any of them yet.
    ADD CONSTRAINT chat_messages_author_kind_check
        CHECK (author_kind IN ('end_user', 'ai_agent', 'human_agent')) NOT VALID,
    ADD CONSTRAINT chat_messages_author_id_check
        CHECK (author_id <> '' AND char_length(author_id) <= 255) NOT VALID,
    ADD CONSTRAINT chat_messages_redacted_check
        CHECK (NOT redacted OR (content = '[redacted]' AND metadata IS NULL)) NOT VALID;

ALTER TABLE chat_drafts
    ADD COLUMN author_kind text,
    ADD COLUMN author_id   text,
    ADD CONSTRAINT chat_drafts_author_kind_check
        CHECK (author_kind IN ('end_user', 'ai_agent', 'human_agent')) NOT VALID,
    ADD CONSTRAINT chat_drafts_author_id_check
        CHECK (author_id <> '' AND char_length(author_id) <= 255) NOT VALID;

-- The rules of the service for text of one line, as for the titles of tickets. A draft keeps them
-- when it becomes a message.
CREATE TRIGGER chat_messages_check_author_id BEFORE INSERT ON chat_messages
    FOR EACH ROW WHEN (NEW.author_id !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('author_id');

CREATE TRIGGER chat_drafts_check_author_id BEFORE INSERT ON chat_drafts
    FOR EACH ROW WHEN (NEW.author_id !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('author_id');

CREATE TRIGGER chat_messages_refuse_author_change
    BEFORE UPDATE OF author_kind, author_id ON chat_messages
    FOR EACH ROW
    WHEN ((OLD.author_kind, OLD.author_id) IS DISTINCT FROM (NEW.author_kind, NEW.author_id))
    EXECUTE FUNCTION refuse_key_change();

CREATE TRIGGER chat_drafts_refuse_author_change
    BEFORE UPDATE OF author_kind, author_id ON chat_drafts
    FOR EACH ROW
    WHEN ((OLD.author_kind, OLD.author_id) IS DISTINCT FROM (NEW.author_kind, NEW.author_id))
    EXECUTE FUNCTION refuse_key_change();

-- An older server maps data exceptions to INVALID_ARGUMENT, and an unknown constraint to INTERNAL: it
-- knows no redacted message, and may be asked to change one.
CREATE FUNCTION refuse_change_of_redacted_message() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'a redacted message stays redacted'
        USING ERRCODE = 'invalid_parameter_value', TABLE = 'chat_messages',
              CONSTRAINT = 'chat_messages_redacted_check';
END
$$;

CREATE TRIGGER chat_messages_refuse_change_of_redacted
    BEFORE UPDATE OF redacted, content, metadata ON chat_messages
    FOR EACH ROW
    WHEN (OLD.redacted AND ((NEW.redacted, NEW.content, NEW.metadata)
                            IS DISTINCT FROM (OLD.redacted, OLD.content, OLD.metadata)))
    EXECUTE FUNCTION refuse_change_of_redacted_message();

ALTER TABLE chat_attachments
    -- The time of the last change. NULL until the first one.
    ADD COLUMN updated_at timestamptz;

-- Both transactions have locked the session, so one of them sees what the other has done.
CREATE FUNCTION chat_attachments_refuse_redacted_message() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM chat_messages m
                WHERE m.tenant_id = NEW.tenant_id AND m.id = NEW.message_id AND m.redacted)
    THEN
        RAISE 'a redacted message takes no attachment'
            USING ERRCODE = 'invalid_parameter_value', TABLE = 'chat_attachments',
                  CONSTRAINT = 'chat_attachments_redacted_check';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER chat_attachments_refuse_redacted_message
    AFTER INSERT OR UPDATE OF message_id ON chat_attachments
    FOR EACH ROW EXECUTE FUNCTION chat_attachments_refuse_redacted_message();

-- The function looks for the table where it is itself, be it `public` or another schema. The
-- search_path names pg_temp last, so that no temporary table stands in for it.
DO $$
DECLARE
    rule regprocedure := 'chat_attachments_refuse_redacted_message()';
BEGIN
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
        SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
         WHERE pg_proc.oid = rule
    ));
END
$$;

-- A JSON merge patch, as RFC 7396 has it. jsonb keeps every digit of a number.
CREATE FUNCTION json_merge_patch(target jsonb, patch jsonb) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF jsonb_typeof(patch) <> 'object' THEN
        RETURN patch;
    END IF;
    IF target IS NULL OR jsonb_typeof(target) <> 'object' THEN
        target := '{}';
    END IF;
    RETURN (target - ARRAY(SELECT jsonb_object_keys(patch))) || coalesce((
        SELECT jsonb_object_agg(
                   key,
                   -- Recursion only where it is needed: each call costs far more than a copy.
                   CASE WHEN jsonb_typeof(value) = 'object'
                        THEN json_merge_patch(target -> key, value)
                        ELSE value END)
          FROM jsonb_each(patch)
         WHERE value <> 'null'
    ), '{}');
END
$$;

-- It calls itself, wherever it is.
DO $$
DECLARE
    rule regprocedure := 'json_merge_patch(jsonb, jsonb)';
BEGIN
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
        SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
         WHERE pg_proc.oid = rule
    ));
END
$$;

-- migrate:down

-- Redacted messages stay without their content.
DROP FUNCTION json_merge_patch(jsonb, jsonb);
DROP TRIGGER chat_attachments_refuse_redacted_message ON chat_attachments;
DROP FUNCTION chat_attachments_refuse_redacted_message();
ALTER TABLE chat_attachments DROP COLUMN updated_at;
DROP TRIGGER chat_messages_refuse_change_of_redacted ON chat_messages;
DROP FUNCTION refuse_change_of_redacted_message();
DROP TRIGGER chat_drafts_refuse_author_change ON chat_drafts;
DROP TRIGGER chat_messages_refuse_author_change ON chat_messages;
DROP TRIGGER chat_drafts_check_author_id ON chat_drafts;
DROP TRIGGER chat_messages_check_author_id ON chat_messages;
ALTER TABLE chat_drafts
    DROP CONSTRAINT chat_drafts_author_id_check,
    DROP CONSTRAINT chat_drafts_author_kind_check,
    DROP COLUMN author_id,
    DROP COLUMN author_kind;
ALTER TABLE chat_messages
    DROP CONSTRAINT chat_messages_redacted_check,
    DROP CONSTRAINT chat_messages_author_id_check,
    DROP CONSTRAINT chat_messages_author_kind_check,
    DROP COLUMN redacted,
    DROP COLUMN author_id,
    DROP COLUMN author_kind;
