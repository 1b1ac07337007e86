-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- The service's rule for titles and names of files: no control character or line break, no blank
-- at an end, and bidirectional controls in pairs.
-- Triggers and not constraints: a constraint also judges rows that are there, whenever anything in
-- them changes, and a ticket with an old title must still be closed. They judge only new text.
-- An older server maps data exceptions to INVALID_ARGUMENT, and an unknown constraint to INTERNAL.
-- A restore of only the data of old rows that break the rule needs --disable-triggers.
CREATE FUNCTION refuse_bad_single_line() RETURNS trigger
    LANGUAGE plpgsql AS $$
DECLARE
    line     text := to_jsonb(NEW) ->> TG_ARGV[0];
    controls text := regexp_replace(line, '[^\u202a-\u202e\u2066-\u2069]', '', 'g');
    rest     text;
BEGIN
    LOOP
        rest := regexp_replace(
            controls, '[\u202a\u202b\u202d\u202e]\u202c|[\u2066-\u2068]\u2069', '', 'g');
        EXIT WHEN rest = controls;
        controls := rest;
    END LOOP;
    IF controls <> ''
       OR line ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]'
       OR line ~ '^[ \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]'
       OR line ~ '[ \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]$'
    THEN
        RAISE '% is no text of one line', TG_ARGV[0]
            USING ERRCODE = 'invalid_parameter_value',
                  TABLE = TG_TABLE_NAME, COLUMN = TG_ARGV[0],
                  CONSTRAINT = TG_TABLE_NAME || '_' || TG_ARGV[0] || '_check';
    END IF;
    RETURN NEW;
END
$$;

-- Most texts begin and end with a visible character and are ASCII: they cost one comparison.
CREATE TRIGGER tickets_check_title_insert BEFORE INSERT ON tickets
    FOR EACH ROW WHEN (NEW.title !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('title');

CREATE TRIGGER tickets_check_title_update BEFORE UPDATE OF title ON tickets
    FOR EACH ROW
    WHEN (NEW.title IS DISTINCT FROM OLD.title AND NEW.title !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('title');

CREATE TRIGGER chat_attachments_check_file_name_insert BEFORE INSERT ON chat_attachments
    FOR EACH ROW WHEN (NEW.file_name !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('file_name');

CREATE TRIGGER chat_attachments_check_file_name_update BEFORE UPDATE OF file_name ON chat_attachments
    FOR EACH ROW
    WHEN (NEW.file_name IS DISTINCT FROM OLD.file_name
          AND NEW.file_name !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('file_name');

-- URLs as programs make them may have blanks inside, and a MIME type may have parameters. Each new
-- constraint permits all that the old one did, so there is nothing to validate.
ALTER TABLE chat_attachments
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT chat_attachments_file_url_check,
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT chat_attachments_file_type_check,
    ADD CONSTRAINT chat_attachments_file_url_check
        CHECK (file_url ~* '^https?://[^/?#[:space:]]' AND file_url !~ '[\u0009-\u000d]| $') NOT VALID,
    ADD CONSTRAINT chat_attachments_file_type_check
        CHECK (file_type ~ '^[!-.0-~]+/[!-.0-~]+( *;[ -~]*)?$') NOT VALID;

-- migrate:down

-- Rows with a blank or with parameters stay, and only new ones are refused.
ALTER TABLE chat_attachments
    DROP CONSTRAINT chat_attachments_file_url_check,
    DROP CONSTRAINT chat_attachments_file_type_check,
    ADD CONSTRAINT chat_attachments_file_url_check
        CHECK (file_url ~* '^https?://[^/?#[:space:]][^[:space:]]*$') NOT VALID,
    ADD CONSTRAINT chat_attachments_file_type_check
        CHECK (file_type ~ '^[!-.0-~]+/[!-.0-~]+$') NOT VALID;
DO $$
BEGIN
    ALTER TABLE chat_attachments
        VALIDATE CONSTRAINT chat_attachments_file_url_check,
        VALIDATE CONSTRAINT chat_attachments_file_type_check;
EXCEPTION
    WHEN check_violation THEN NULL;
END
$$;
DROP TRIGGER chat_attachments_check_file_name_update ON chat_attachments;
DROP TRIGGER chat_attachments_check_file_name_insert ON chat_attachments;
DROP TRIGGER tickets_check_title_update ON tickets;
DROP TRIGGER tickets_check_title_insert ON tickets;
DROP FUNCTION refuse_bad_single_line();
