-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- Whether this session restores a dump. The scripts of pg_dump, and pg_restore, set both settings
-- and name every table with its schema. No statement of the service finds a table that way.
-- Whoever sets both by hand is taken at their word about has_ticket, and about nothing else.
CREATE FUNCTION is_restore() RETURNS boolean
    LANGUAGE sql STABLE
    RETURN current_setting('search_path') IN ('', '""')
       AND current_setting('check_function_bodies') = 'off';

-- A dump restores sessions before their chat tickets, each table in a transaction of its own.
CREATE OR REPLACE TRIGGER chat_sessions_check_has_ticket_insert BEFORE INSERT ON chat_sessions
    FOR EACH ROW WHEN (NEW.has_ticket AND NOT is_restore())
    EXECUTE FUNCTION chat_sessions_check_has_ticket();

-- With an argument, it restores: a session that has_ticket is as it was with its link.
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

CREATE OR REPLACE TRIGGER chat_tickets_link AFTER INSERT ON chat_tickets
    FOR EACH ROW WHEN (NOT is_restore()) EXECUTE FUNCTION chat_tickets_link();

CREATE TRIGGER chat_tickets_link_restored AFTER INSERT ON chat_tickets
    FOR EACH ROW WHEN (is_restore()) EXECUTE FUNCTION chat_tickets_link('restored');

-- The functions look for the tables where they are themselves, be it `public` or another schema.
-- The search_path names pg_temp last, so that no temporary table stands in for one of ours.
DO $$
DECLARE
    rule regprocedure;
BEGIN
    FOREACH rule IN ARRAY ARRAY[
        'chat_messages_refuse_tombstoned_id()',
        'chat_tickets_link()',
        'chat_tickets_unlink()',
        'chat_sessions_check_has_ticket()',
        'chat_sessions_refuse_delete()'
    ]::regprocedure[] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
            SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
             WHERE pg_proc.oid = rule
        ));
    END LOOP;
END
$$;

-- migrate:down

DROP TRIGGER chat_tickets_link_restored ON chat_tickets;

CREATE OR REPLACE TRIGGER chat_tickets_link AFTER INSERT ON chat_tickets
    FOR EACH ROW EXECUTE FUNCTION chat_tickets_link();

CREATE OR REPLACE TRIGGER chat_sessions_check_has_ticket_insert BEFORE INSERT ON chat_sessions
    FOR EACH ROW WHEN (NEW.has_ticket)
    EXECUTE FUNCTION chat_sessions_check_has_ticket();

DROP FUNCTION is_restore();

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
    RETURNING status INTO session_status;
    IF session_status = 'archived' THEN
        RAISE 'an archived session takes no ticket'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'chat_tickets_session_status_check';
    END IF;
    RETURN NULL;
END
$$;

ALTER FUNCTION chat_messages_refuse_tombstoned_id() SET search_path = public, pg_temp;
ALTER FUNCTION chat_tickets_link() SET search_path = public, pg_temp;
ALTER FUNCTION chat_tickets_unlink() SET search_path = public, pg_temp;
ALTER FUNCTION chat_sessions_check_has_ticket() SET search_path = public, pg_temp;
ALTER FUNCTION chat_sessions_refuse_delete() SET search_path = public, pg_temp;
