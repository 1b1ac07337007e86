-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

CREATE TABLE tickets (
    id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    tenant_id  text        NOT NULL,
    title      text        NOT NULL,
    status     text        NOT NULL DEFAULT 'open',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tickets_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT tickets_tenant_id_check CHECK (tenant_id <> ''),
    CONSTRAINT tickets_title_check CHECK (title <> ''),
    CONSTRAINT tickets_status_check CHECK (status IN ('open', 'pending', 'solved', 'closed'))
);

CREATE INDEX idx_tickets_tenant ON tickets (tenant_id, created_at, id);

CREATE TABLE chat_tickets (
    id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    tenant_id  text        NOT NULL,
    session_id uuid        NOT NULL,
    ticket_id  uuid        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT chat_tickets_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_chat_tickets_session FOREIGN KEY (tenant_id, session_id)
        REFERENCES chat_sessions (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT fk_chat_tickets_ticket FOREIGN KEY (tenant_id, ticket_id)
        REFERENCES tickets (tenant_id, id)
);

-- One ticket per session.
CREATE UNIQUE INDEX idx_chat_tickets_session ON chat_tickets (tenant_id, session_id);
CREATE INDEX idx_chat_tickets_ticket ON chat_tickets (tenant_id, ticket_id, created_at, id);

-- Each rule trigger judges in a statement of its own, after the session's row is locked: under
-- READ COMMITTED only such a statement sees what the transaction it waited for has committed.
-- The search_path names pg_temp last, so that no temporary table stands in for one of ours.

CREATE FUNCTION chat_tickets_link() RETURNS trigger
    LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
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

CREATE TRIGGER chat_tickets_link AFTER INSERT ON chat_tickets
    FOR EACH ROW EXECUTE FUNCTION chat_tickets_link();

-- Also run by the session's own cascade, when there is no session left to update.
CREATE FUNCTION chat_tickets_unlink() RETURNS trigger
    LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE chat_sessions
       SET has_ticket = false,
           revision = revision + 1,
           updated_at = next_change_time(updated_at)
     WHERE tenant_id = OLD.tenant_id AND id = OLD.session_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER chat_tickets_unlink AFTER DELETE ON chat_tickets
    FOR EACH ROW EXECUTE FUNCTION chat_tickets_unlink();

CREATE TRIGGER chat_tickets_refuse_key_change
    BEFORE UPDATE OF id, tenant_id, session_id, ticket_id ON chat_tickets
    FOR EACH ROW
    WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.ticket_id)
          IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.ticket_id))
    EXECUTE FUNCTION refuse_key_change();

-- TRUNCATE fires no row trigger, so it would leave has_ticket behind and lose active tickets.
CREATE FUNCTION chat_tickets_refuse_truncate() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'chat tickets are deleted, not truncated'
        USING ERRCODE = 'restrict_violation', CONSTRAINT = 'chat_tickets_truncate_check';
END
$$;

CREATE TRIGGER chat_tickets_refuse_truncate BEFORE TRUNCATE ON chat_tickets
    FOR EACH STATEMENT EXECUTE FUNCTION chat_tickets_refuse_truncate();

CREATE FUNCTION chat_sessions_check_has_ticket() RETURNS trigger
    LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.has_ticket IS DISTINCT FROM EXISTS (
        SELECT FROM chat_tickets WHERE tenant_id = NEW.tenant_id AND session_id = NEW.id
    ) THEN
        RAISE 'has_ticket is true exactly while a chat ticket exists'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'chat_sessions_has_ticket_check';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER chat_sessions_check_has_ticket_insert BEFORE INSERT ON chat_sessions
    FOR EACH ROW WHEN (NEW.has_ticket)
    EXECUTE FUNCTION chat_sessions_check_has_ticket();

CREATE TRIGGER chat_sessions_check_has_ticket_update BEFORE UPDATE OF has_ticket ON chat_sessions
    FOR EACH ROW EXECUTE FUNCTION chat_sessions_check_has_ticket();

CREATE FUNCTION chat_sessions_refuse_delete() RETURNS trigger
    LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    -- Every linked ticket is locked, whatever its status: one could be reopening right now.
    PERFORM FROM tickets t
       JOIN chat_tickets ct ON ct.tenant_id = t.tenant_id AND ct.ticket_id = t.id
      WHERE ct.tenant_id = OLD.tenant_id AND ct.session_id = OLD.id
        FOR SHARE OF t;
    IF EXISTS (
        SELECT FROM tickets t
          JOIN chat_tickets ct ON ct.tenant_id = t.tenant_id AND ct.ticket_id = t.id
         WHERE ct.tenant_id = OLD.tenant_id AND ct.session_id = OLD.id
           AND t.status IN ('open', 'pending')
    ) THEN
        RAISE 'the session has an active ticket'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'chat_sessions_ticket_status_check';
    END IF;
    RETURN OLD;
END
$$;

CREATE TRIGGER chat_sessions_refuse_delete BEFORE DELETE ON chat_sessions
    FOR EACH ROW EXECUTE FUNCTION chat_sessions_refuse_delete();

-- migrate:down

DROP TRIGGER chat_sessions_refuse_delete ON chat_sessions;
DROP TRIGGER chat_sessions_check_has_ticket_update ON chat_sessions;
DROP TRIGGER chat_sessions_check_has_ticket_insert ON chat_sessions;
DROP TABLE chat_tickets;
DROP TABLE tickets;
DROP FUNCTION chat_sessions_refuse_delete();
DROP FUNCTION chat_sessions_check_has_ticket();
DROP FUNCTION chat_tickets_refuse_truncate();
DROP FUNCTION chat_tickets_unlink();
DROP FUNCTION chat_tickets_link();
