-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- A deleted session: its id is not used again, as long as the row is here. It has nothing of what the
-- session was. Servers sweep old rows.
CREATE TABLE chat_session_tombstones (
    tenant_id  text        NOT NULL,
    session_id uuid        NOT NULL,
    deleted_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT chat_session_tombstones_pkey PRIMARY KEY (tenant_id, session_id)
);

CREATE INDEX idx_chat_session_tombstones_deleted ON chat_session_tombstones (deleted_at);

-- Its tenant_id is ordered as everywhere (see set_tenant_collation).
DO $$
BEGIN
    EXECUTE format(
        'ALTER TABLE chat_session_tombstones ALTER COLUMN tenant_id TYPE text COLLATE %s', (
            SELECT quote_ident(nspname) || '.' || quote_ident(collname)
              FROM pg_attribute a
              JOIN pg_collation c ON c.oid = a.attcollation
              JOIN pg_namespace n ON n.oid = c.collnamespace
             WHERE attrelid = 'chat_sessions'::regclass AND attname = 'tenant_id'
        )
    );
END
$$;

-- Here and not in the service, so that an older server leaves them too.
CREATE FUNCTION chat_sessions_leave_tombstones() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chat_session_tombstones (tenant_id, session_id)
    SELECT tenant_id, id FROM deleted
        ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;

CREATE TRIGGER chat_sessions_leave_tombstones
    AFTER DELETE ON chat_sessions REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION chat_sessions_leave_tombstones();

-- AFTER, so that an insert which waited for the deletion of the same id sees its tombstone.
CREATE FUNCTION chat_sessions_refuse_tombstoned_id() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM chat_session_tombstones t
                WHERE t.tenant_id = NEW.tenant_id AND t.session_id = NEW.id)
    THEN
        RAISE 'the session id belonged to a deleted session'
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'chat_session_tombstones_pkey';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER chat_sessions_refuse_tombstoned_id AFTER INSERT ON chat_sessions
    FOR EACH ROW EXECUTE FUNCTION chat_sessions_refuse_tombstoned_id();

-- The functions look for the tables where they are themselves, be it `public` or another schema.
-- The search_path names pg_temp last, so that no temporary table stands in for one of ours.
DO $$
DECLARE
    rule regprocedure;
BEGIN
    FOREACH rule IN ARRAY ARRAY[
        'chat_sessions_leave_tombstones()',
        'chat_sessions_refuse_tombstoned_id()'
    ]::regprocedure[] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
            SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
             WHERE pg_proc.oid = rule
        ));
    END LOOP;
END
$$;

-- Whoever may use the sessions may use their tombstones: a role that serves does not own the tables.
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
           AND grantee <> (SELECT relowner FROM pg_class
                            WHERE oid = 'chat_session_tombstones'::regclass)
         GROUP BY grantee, privilege_type
    LOOP
        EXECUTE format('GRANT %s ON chat_session_tombstones TO %s%s',
                       granted.privilege_type, granted.role, granted.option);
    END LOOP;
END
$$;

-- As before, and for the tombstones of sessions too.
CREATE OR REPLACE FUNCTION set_tenant_collation(collation_name text) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    changed regclass;
BEGIN
    -- PostgreSQL changes no column that a trigger names.
    DROP TRIGGER chat_messages_refuse_key_change ON chat_messages;
    DROP TRIGGER chat_tickets_refuse_key_change ON chat_tickets;
    DROP TRIGGER chat_drafts_refuse_key_change ON chat_drafts;
    FOREACH changed IN ARRAY ARRAY[
        'chat_sessions', 'chat_messages', 'chat_message_tombstones', 'chat_attachments',
        'tickets', 'chat_tickets', 'tenant_settings', 'chat_drafts', 'chat_draft_pieces',
        'chat_session_tombstones'
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
    CREATE TRIGGER chat_drafts_refuse_key_change
        BEFORE UPDATE OF id, tenant_id, session_id, role ON chat_drafts
        FOR EACH ROW
        WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.role)
              IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.role))
        EXECUTE FUNCTION refuse_key_change();
END
$$;

-- migrate:down

-- The ids of deleted sessions can be used again.
DROP TRIGGER chat_sessions_refuse_tombstoned_id ON chat_sessions;
DROP TRIGGER chat_sessions_leave_tombstones ON chat_sessions;
DROP FUNCTION chat_sessions_refuse_tombstoned_id();
DROP FUNCTION chat_sessions_leave_tombstones();
DROP TABLE chat_session_tombstones;

CREATE OR REPLACE FUNCTION set_tenant_collation(collation_name text) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    changed regclass;
BEGIN
    -- PostgreSQL changes no column that a trigger names.
    DROP TRIGGER chat_messages_refuse_key_change ON chat_messages;
    DROP TRIGGER chat_tickets_refuse_key_change ON chat_tickets;
    DROP TRIGGER chat_drafts_refuse_key_change ON chat_drafts;
    FOREACH changed IN ARRAY ARRAY[
        'chat_sessions', 'chat_messages', 'chat_message_tombstones', 'chat_attachments',
        'tickets', 'chat_tickets', 'tenant_settings', 'chat_drafts', 'chat_draft_pieces'
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
    CREATE TRIGGER chat_drafts_refuse_key_change
        BEFORE UPDATE OF id, tenant_id, session_id, role ON chat_drafts
        FOR EACH ROW
        WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.role)
              IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.role))
        EXECUTE FUNCTION refuse_key_change();
END
$$;
