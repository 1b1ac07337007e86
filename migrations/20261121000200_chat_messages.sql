-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

CREATE TABLE chat_messages (
    id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    tenant_id  text        NOT NULL,
    session_id uuid        NOT NULL,
    -- The session's revision that inserted the message: the total order of a session.
    sequence   bigint      NOT NULL,
    -- The session's revision that last changed the message or its attachments.
    revision   bigint      NOT NULL,
    role       text        NOT NULL,
    content    text        NOT NULL,
    metadata   jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT chat_messages_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_chat_messages_session FOREIGN KEY (tenant_id, session_id)
        REFERENCES chat_sessions (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT chat_messages_sequence_check CHECK (sequence > 0),
    CONSTRAINT chat_messages_revision_check CHECK (revision >= sequence),
    CONSTRAINT chat_messages_role_check CHECK (role IN ('user', 'assistant')),
    CONSTRAINT chat_messages_content_check CHECK (content <> ''),
    CONSTRAINT chat_messages_metadata_check CHECK (jsonb_typeof(metadata) = 'object')
);

-- Two messages of one session cannot hold the same place in it.
CREATE UNIQUE INDEX idx_chat_messages_session ON chat_messages (tenant_id, session_id, sequence);

-- What a follower has to be told again; most messages never change and are not in it.
CREATE INDEX idx_chat_messages_changed ON chat_messages (tenant_id, session_id, revision)
    WHERE revision > sequence;

CREATE INDEX idx_chat_messages_content ON chat_messages
    USING gin (to_tsvector('english', content));

-- A deleted message, until its session goes: followers are told, and its id is not used again.
CREATE TABLE chat_message_tombstones (
    tenant_id  text   NOT NULL,
    session_id uuid   NOT NULL,
    message_id uuid   NOT NULL,
    revision   bigint NOT NULL,
    CONSTRAINT chat_message_tombstones_pkey PRIMARY KEY (tenant_id, message_id),
    CONSTRAINT fk_chat_message_tombstones_session FOREIGN KEY (tenant_id, session_id)
        REFERENCES chat_sessions (tenant_id, id) ON DELETE CASCADE
);

CREATE UNIQUE INDEX idx_chat_message_tombstones_session
    ON chat_message_tombstones (tenant_id, session_id, revision);

-- What a row is and where it stands does not change; used by chat_tickets as well.
CREATE FUNCTION refuse_key_change() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'the keys of % do not change', TG_TABLE_NAME
        USING ERRCODE = 'check_violation', CONSTRAINT = TG_TABLE_NAME || '_keys_check';
END
$$;

CREATE TRIGGER chat_messages_refuse_key_change
    BEFORE UPDATE OF id, tenant_id, session_id, sequence ON chat_messages
    FOR EACH ROW
    WHEN ((OLD.id, OLD.tenant_id, OLD.session_id, OLD.sequence)
          IS DISTINCT FROM (NEW.id, NEW.tenant_id, NEW.session_id, NEW.sequence))
    EXECUTE FUNCTION refuse_key_change();

-- AFTER, so that an insert which waited for the deletion of the same id sees its tombstone.
-- The search_path names pg_temp last, so that no temporary table stands in for one of ours.
CREATE FUNCTION chat_messages_refuse_tombstoned_id() RETURNS trigger
    LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
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

CREATE TRIGGER chat_messages_refuse_tombstoned_id
    AFTER INSERT ON chat_messages REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION chat_messages_refuse_tombstoned_id();

-- migrate:down

DROP TABLE chat_message_tombstones;
DROP TABLE chat_messages;
DROP FUNCTION chat_messages_refuse_tombstoned_id();
DROP FUNCTION refuse_key_change();
