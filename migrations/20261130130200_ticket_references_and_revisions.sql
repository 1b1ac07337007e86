-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

ALTER TABLE tickets
    -- The ticket in the help desk that it came from, or went to. In the order of its bytes, as no
    -- version of a library changes that.
    ADD COLUMN external_ref text COLLATE "C",
    -- Incremented by every change.
    ADD COLUMN revision     bigint NOT NULL DEFAULT 0,
    -- Not validated, which would read the whole table: no row breaks them yet.
    ADD CONSTRAINT tickets_external_ref_check
        CHECK (external_ref <> '' AND char_length(external_ref) <= 255) NOT VALID,
    ADD CONSTRAINT tickets_revision_check CHECK (revision >= 0) NOT VALID;

-- The rules of the service for text of one line, as for titles.
CREATE TRIGGER tickets_check_external_ref_insert BEFORE INSERT ON tickets
    FOR EACH ROW WHEN (NEW.external_ref !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('external_ref');

CREATE TRIGGER tickets_check_external_ref_update BEFORE UPDATE OF external_ref ON tickets
    FOR EACH ROW
    WHEN (NEW.external_ref IS DISTINCT FROM OLD.external_ref
          AND NEW.external_ref !~ '^[!-~]([ -~]*[!-~])?$')
    EXECUTE FUNCTION refuse_bad_single_line('external_ref');

-- Here and not in the service, so that an older server's changes count too.
CREATE FUNCTION tickets_take_revision() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    NEW.revision := OLD.revision + 1;
    RETURN NEW;
END
$$;

CREATE TRIGGER tickets_take_revision
    BEFORE UPDATE OF title, status, external_ref ON tickets
    FOR EACH ROW
    WHEN ((OLD.title, OLD.status, OLD.external_ref)
          IS DISTINCT FROM (NEW.title, NEW.status, NEW.external_ref))
    EXECUTE FUNCTION tickets_take_revision();

-- A change of a ticket is a change of every session that it serves, so that their followers are
-- told. The sessions are locked in the order of their ids. The service has locked them before, as
-- every transaction locks a session before its ticket. An older server has not: then PostgreSQL may
-- find a deadlock, and the server tries again.
CREATE FUNCTION tickets_change_sessions() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM chat_sessions s
      WHERE s.tenant_id = NEW.tenant_id
        AND s.id IN (SELECT ct.session_id FROM chat_tickets ct
                      WHERE ct.tenant_id = NEW.tenant_id AND ct.ticket_id = NEW.id)
      ORDER BY s.id
        FOR NO KEY UPDATE;
    UPDATE chat_sessions s
       SET revision = revision + 1,
           updated_at = next_change_time(updated_at)
     WHERE s.tenant_id = NEW.tenant_id
       AND s.id IN (SELECT ct.session_id FROM chat_tickets ct
                     WHERE ct.tenant_id = NEW.tenant_id AND ct.ticket_id = NEW.id);
    RETURN NULL;
END
$$;

CREATE TRIGGER tickets_change_sessions
    AFTER UPDATE OF title, status, external_ref ON tickets
    FOR EACH ROW
    WHEN ((OLD.title, OLD.status, OLD.external_ref)
          IS DISTINCT FROM (NEW.title, NEW.status, NEW.external_ref))
    EXECUTE FUNCTION tickets_change_sessions();

-- As before, and it locks the ticket too: of a link and a change of the ticket at once, the second
-- sees what the first has done.
CREATE OR REPLACE FUNCTION chat_tickets_link() RETURNS trigger
    LANGUAGE plpgsql AS $$
DECLARE
    session_status text;
BEGIN
    UPDATE chat_sessions
       SET has_ticket = true,
           revision = revision + 1,
           updated_at = next_change_time(updated_at)
     WHERE tenant_id = NEW.tenant_id AND id = NEW.session_id
       AND (TG_NARGS = 0 OR NOT has_ticket)
    RETURNING status INTO session_status;
    IF session_status = 'archived' THEN
        RAISE 'an archived session takes no ticket'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'chat_tickets_session_status_check';
    END IF;
    PERFORM FROM tickets t
      WHERE t.tenant_id = NEW.tenant_id AND t.id = NEW.ticket_id
        FOR NO KEY UPDATE;
    RETURN NULL;
END
$$;

-- The functions look for the tables where they are themselves, be it `public` or another schema.
-- The search_path names pg_temp last, so that no temporary table stands in for one of ours.
DO $$
DECLARE
    rule regprocedure;
BEGIN
    FOREACH rule IN ARRAY ARRAY[
        'chat_tickets_link()',
        'tickets_change_sessions()'
    ]::regprocedure[] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
            SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
             WHERE pg_proc.oid = rule
        ));
    END LOOP;
END
$$;

-- migrate:down

DROP TRIGGER tickets_change_sessions ON tickets;
DROP TRIGGER tickets_take_revision ON tickets;
DROP FUNCTION tickets_change_sessions();
DROP FUNCTION tickets_take_revision();
DROP TRIGGER tickets_check_external_ref_update ON tickets;
DROP TRIGGER tickets_check_external_ref_insert ON tickets;
ALTER TABLE tickets
    DROP CONSTRAINT tickets_revision_check,
    DROP CONSTRAINT tickets_external_ref_check,
    DROP COLUMN revision,
    DROP COLUMN external_ref;

CREATE OR REPLACE FUNCTION chat_tickets_link() RETURNS trigger
    LANGUAGE plpgsql AS $$
DECLARE
    session_status text;
BEGIN
    UPDATE chat_sessions
       SET has_ticket = true,
           revision = revision + 1,
           updated_at = next_change_time(updated_at)
     WHERE tenant_id = NEW.tenant_id AND id = NEW.session_id
       AND (TG_NARGS = 0 OR NOT has_ticket)
    RETURNING status INTO session_status;
    IF session_status = 'archived' THEN
        RAISE 'an archived session takes no ticket'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'chat_tickets_session_status_check';
    END IF;
    RETURN NULL;
END
$$;

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION chat_tickets_link() SET search_path = %I, pg_temp', (
        SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
         WHERE pg_proc.oid = 'chat_tickets_link()'::regprocedure
    ));
END
$$;
