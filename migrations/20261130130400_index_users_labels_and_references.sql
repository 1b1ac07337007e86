-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- In a migration of their own: one that adds a column holds up reads too, until it ends.

-- What the index of labels has for a session: each label together with the tenant. So a label is found
-- without reading other tenants' sessions.
CREATE FUNCTION label_pairs(tenant_id text, labels jsonb) RETURNS text[]
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN (SELECT array_agg(tenant_id || chr(1) || label.key || '=' || label.value)
              FROM jsonb_each_text(labels) AS label);

-- None of these keeps an append from a HOT update: messages change no column that they name.
-- Writes wait while they are built, under a second for a million rows, as no row is in them.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_chat_sessions_user ON chat_sessions (tenant_id, user_id, created_at, id)
    WHERE user_id IS NOT NULL;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_chat_sessions_labels ON chat_sessions
    USING gin (label_pairs(tenant_id COLLATE "C", labels)) WITH (fastupdate = off)
    WHERE labels IS NOT NULL;
-- So PostgreSQL knows how often a label is set in a tenant: it reads the sessions in order to list
-- those with a common one, and the index for a rare one. It uses no statistics of a partial index.
CREATE STATISTICS chat_sessions_label_pairs ON (label_pairs(tenant_id COLLATE "C", labels))
    FROM chat_sessions;
-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX idx_tickets_external_ref ON tickets (tenant_id, external_ref)
    WHERE external_ref IS NOT NULL;
-- This one takes some seconds for a million tickets. Where writes must not wait, let the statement
-- run CONCURRENTLY before the migration, which then finds the index.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_tickets_updated ON tickets (tenant_id, updated_at, id);

-- migrate:down

DROP INDEX idx_tickets_updated;
DROP INDEX idx_tickets_external_ref;
DROP STATISTICS chat_sessions_label_pairs;
DROP INDEX idx_chat_sessions_labels;
DROP INDEX idx_chat_sessions_user;
DROP FUNCTION label_pairs(text, jsonb);
