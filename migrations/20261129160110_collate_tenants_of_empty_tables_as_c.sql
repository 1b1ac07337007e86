-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- Sets the collation of tenant_id in every table. "C" orders by bytes. The order of another may
-- change with the C library or ICU of the machine, and leaves an index on it out of order.
-- Everybody waits while all indexes are built anew. No heap is.
CREATE FUNCTION set_tenant_collation(collation_name text) RETURNS void
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

-- Only in empty tables that no server is connected to. Elsewhere it would stop all calls for as long
-- as the indexes take, and end the prepared statements of the servers of the version before, which
-- return the column. docs/operations/upgrade.md says how an operator does it for other tables.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM chat_sessions) AND NOT EXISTS (SELECT FROM tickets)
       AND NOT EXISTS (
           SELECT FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'chat-ticket-svc'
       )
    THEN
        PERFORM set_tenant_collation('C');
    END IF;
END
$$;

-- migrate:down

DO $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_attribute
         WHERE attrelid = 'chat_sessions'::regclass AND attname = 'tenant_id'
           AND attcollation = '"C"'::regcollation
    ) THEN
        PERFORM set_tenant_collation('default');
    END IF;
END
$$;
DROP FUNCTION set_tenant_collation(text);
