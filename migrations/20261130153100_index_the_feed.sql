-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- In a migration of their own: one that adds a column holds up reads too, until it ends.

-- Writes wait while these are built: about a second for a million rows.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_chat_sessions_feed ON chat_sessions (tenant_id, feed_bucket, id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_tickets_feed ON tickets (tenant_id, feed_bucket, id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_chat_session_tombstones_feed
    ON chat_session_tombstones (tenant_id, feed_bucket, session_id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_ticket_tombstones_feed
    ON ticket_tombstones (tenant_id, feed_bucket, ticket_id);

-- migrate:down

DROP INDEX idx_ticket_tombstones_feed;
DROP INDEX idx_chat_session_tombstones_feed;
DROP INDEX idx_tickets_feed;
DROP INDEX idx_chat_sessions_feed;
