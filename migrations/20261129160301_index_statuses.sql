-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- A list by a rare status read all rows of the tenant. With the status before the time, it reads the
-- rows of a page. Neither index keeps an append from a HOT update: messages change none of these
-- columns, except updated_hour once an hour, which has an index already.
-- Writes wait while they are built, some seconds for a million rows each. Where they must not,
-- let these statements run CONCURRENTLY before the migration, which then finds the indexes.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_tickets_status ON tickets (tenant_id, status, created_at, id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_chat_sessions_status
    ON chat_sessions (tenant_id, status, has_ticket, created_at, id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_chat_sessions_status_updated
    ON chat_sessions (tenant_id, status, has_ticket, updated_hour);

-- migrate:down

DROP INDEX idx_chat_sessions_status_updated;
DROP INDEX idx_chat_sessions_status;
DROP INDEX idx_tickets_status;
