-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- Whether a message is whole. NULL is: it needs no space, and it is what an older server writes.
ALTER TABLE chat_messages
    ADD COLUMN state text,
    -- Not validated, which would read the whole table: no row has one yet.
    ADD CONSTRAINT chat_messages_state_check
        CHECK (state IN ('incomplete', 'stopped')) NOT VALID;

-- Messages that are being written. The row of a draft is updated with each piece, so it is kept
-- small, pages have room for its next version, and no index has a column that changes.
CREATE TABLE chat_drafts (
    id            uuid        NOT NULL,
    tenant_id     text        NOT NULL,
    session_id    uuid        NOT NULL,
    -- Raised by each writer that takes the draft over. A writer with a lower number writes no more.
    fencing_token bigint      NOT NULL DEFAULT 1,
    -- Of the content, in bytes of UTF-8.
    length        bigint      NOT NULL DEFAULT 0,
    -- When the writer counts as lost. By the clock of the database, as all of these times.
    expires_at    timestamptz NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    role          text        NOT NULL,
    language_code text,
    metadata      jsonb,
    CONSTRAINT chat_drafts_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_chat_drafts_session FOREIGN KEY (tenant_id, session_id)
        REFERENCES chat_sessions (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT chat_drafts_fencing_token_check CHECK (fencing_token > 0),
    CONSTRAINT chat_drafts_length_check CHECK (length >= 0),
    CONSTRAINT chat_drafts_role_check CHECK (role IN ('user', 'assistant')),
    CONSTRAINT chat_drafts_language_code_check
        CHECK (language_code ~ '^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$'
               AND char_length(language_code) <= 35),
    CONSTRAINT chat_drafts_metadata_check CHECK (jsonb_typeof(metadata) = 'object')
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);

CREATE INDEX idx_chat_drafts_session ON chat_drafts (tenant_id, session_id);

-- The content of a draft, in the order of start_offset. Rows are inserted, never updated, and deleted
-- with their draft.
CREATE TABLE chat_draft_pieces (
    tenant_id    text    NOT NULL,
    draft_id     uuid    NOT NULL,
    -- The length of the pieces before it, in bytes of UTF-8.
    start_offset bigint  NOT NULL,
    content      text    NOT NULL,
    CONSTRAINT chat_draft_pieces_pkey PRIMARY KEY (tenant_id, draft_id, start_offset),
    CONSTRAINT fk_chat_draft_pieces_draft FOREIGN KEY (tenant_id, draft_id)
        REFERENCES chat_drafts (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT chat_draft_pieces_start_offset_check CHECK (start_offset >= 0),
    CONSTRAINT chat_draft_pieces_content_check CHECK (content <> '')
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0
);

-- Their tenant_id is ordered as everywhere (see set_tenant_collation).
DO $$
DECLARE
    collation_name text := (
        SELECT quote_ident(nspname) || '.' || quote_ident(collname)
          FROM pg_attribute a
          JOIN pg_collation c ON c.oid = a.attcollation
          JOIN pg_namespace n ON n.oid = c.collnamespace
         WHERE attrelid = 'chat_sessions'::regclass AND attname = 'tenant_id'
    );
    created regclass;
BEGIN
    FOREACH created IN ARRAY ARRAY['chat_drafts', 'chat_draft_pieces']::regclass[] LOOP
        EXECUTE format(
            'ALTER TABLE %s ALTER COLUMN tenant_id TYPE text COLLATE %s', created, collation_name
        );
    END LOOP;
END
$$;

-- What a draft is does not change, and a draft that was taken over is not given back.
CREATE TRIGGER chat_drafts_refuse_key_change
    BEFORE UPDATE OF id, tenant_id, session_id, role ON chat_drafts
    FOR EACH ROW
    WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.role)
          IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.role))
    EXECUTE FUNCTION refuse_key_change();

CREATE FUNCTION refuse_lower_fencing_token() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'a draft that was taken over is not given back'
        USING ERRCODE = 'check_violation', CONSTRAINT = 'chat_drafts_fencing_token_check';
END
$$;

CREATE TRIGGER chat_drafts_refuse_lower_fencing_token
    BEFORE UPDATE OF fencing_token ON chat_drafts
    FOR EACH ROW WHEN (NEW.fencing_token < OLD.fencing_token)
    EXECUTE FUNCTION refuse_lower_fencing_token();

-- No draft has the id of a message, or of a deleted one. The triggers wait for each other by an
-- advisory lock on the id: of two transactions that use one at once, the second sees what the first
-- has done. Nobody waits for another id.
CREATE FUNCTION chat_drafts_refuse_message_id() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(uuid_hash_extended(NEW.id, 0));
    IF EXISTS (SELECT FROM chat_messages m WHERE m.tenant_id = NEW.tenant_id AND m.id = NEW.id)
       OR EXISTS (SELECT FROM chat_message_tombstones t
                   WHERE t.tenant_id = NEW.tenant_id AND t.message_id = NEW.id)
    THEN
        RAISE 'the id belongs to a message'
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'chat_drafts_message_id_check';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER chat_drafts_refuse_message_id
    AFTER INSERT ON chat_drafts
    FOR EACH ROW EXECUTE FUNCTION chat_drafts_refuse_message_id();

-- As before, and not with the id of a draft either. COPY inserts more messages than PostgreSQL has
-- locks: from 1,000 on, one lock on the table holds up all drafts instead, until the transaction ends.
-- Every message pays for this, so there is one query for both rules.
CREATE OR REPLACE FUNCTION chat_messages_refuse_tombstoned_id() RETURNS trigger
    LANGUAGE plpgsql AS $$
DECLARE
    locks integer;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(uuid_hash_extended(id, 0)) FROM inserted LIMIT 1000;
    GET DIAGNOSTICS locks = ROW_COUNT;
    IF locks = 1000 THEN
        LOCK TABLE chat_drafts IN SHARE MODE;
    END IF;
    IF EXISTS (
        SELECT FROM inserted
          JOIN chat_message_tombstones t
            ON t.tenant_id = inserted.tenant_id AND t.message_id = inserted.id
         UNION ALL
        SELECT FROM inserted
          JOIN chat_drafts d ON d.tenant_id = inserted.tenant_id AND d.id = inserted.id
    ) THEN
        IF EXISTS (SELECT FROM inserted
                     JOIN chat_drafts d ON d.tenant_id = inserted.tenant_id AND d.id = inserted.id)
        THEN
            -- With a name that older servers know: they tell the caller to try again.
            RAISE 'the message id belongs to a draft'
                USING ERRCODE = 'unique_violation', CONSTRAINT = 'chat_messages_pkey';
        END IF;
        RAISE 'the message id belonged to a deleted message'
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'chat_message_tombstones_pkey';
    END IF;
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
        'chat_drafts_refuse_message_id()',
        'chat_messages_refuse_tombstoned_id()'
    ]::regprocedure[] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
            SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
             WHERE pg_proc.oid = rule
        ));
    END LOOP;
END
$$;

-- Whoever may use the sessions may use the drafts: a role that serves does not own the tables.
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
           AND grantee <> (SELECT relowner FROM pg_class WHERE oid = 'chat_drafts'::regclass)
         GROUP BY grantee, privilege_type
    LOOP
        EXECUTE format('GRANT %s ON chat_drafts, chat_draft_pieces TO %s%s',
                       granted.privilege_type, granted.role, granted.option);
    END LOOP;
END
$$;

-- As before, and for the drafts too.
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

-- migrate:down

-- Open drafts become nothing, and the states of messages are lost.
DROP TABLE chat_draft_pieces;
DROP TABLE chat_drafts;
DROP FUNCTION refuse_lower_fencing_token();
DROP FUNCTION chat_drafts_refuse_message_id();
ALTER TABLE chat_messages
    DROP CONSTRAINT chat_messages_state_check,
    DROP COLUMN state;

CREATE OR REPLACE FUNCTION chat_messages_refuse_tombstoned_id() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM inserted
          JOIN chat_message_tombstones t
            ON t.tenant_id = inserted.tenant_id AND t.message_id = inserted.id
    ) THEN
        RAISE 'the message id belonged to a deleted message'
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'chat_message_tombstones_pkey';
    END IF;
    RETURN NULL;
END
$$;

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION chat_messages_refuse_tombstoned_id() SET search_path = %I, pg_temp', (
        SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
         WHERE pg_proc.oid = 'chat_messages_refuse_tombstoned_id()'::regprocedure
    ));
END
$$;

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
