-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- The tenant leads the index of words too: a search no longer reads what matches of all tenants.
-- The extension comes with PostgreSQL, and whoever may create in the database may create it.
CREATE EXTENSION IF NOT EXISTS btree_gin;

-- Writes wait while it is built, about 15 seconds for a million messages. Where they must not, let
-- this statement run CONCURRENTLY before the migration, which then finds the index. Not within it:
-- it would wait for the migrations that wait for this one.
-- New messages gather in a list that every search reads whole, so it is kept short.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS idx_chat_messages_tenant_content ON chat_messages
    USING gin (tenant_id, to_tsvector('english', content))
    WITH (gin_pending_list_limit = 512);

-- squawk-ignore require-concurrent-index-deletion
DROP INDEX idx_chat_messages_content;
-- squawk-ignore renaming-object
ALTER INDEX idx_chat_messages_tenant_content RENAME TO idx_chat_messages_content;

-- What the planner knows of words it knows of an index, and of this one nothing yet.
-- Found empty, the table would be planned for as if it stayed so, by plans that stay.
DO $$
BEGIN
    IF EXISTS (SELECT FROM chat_messages) THEN
        ANALYZE chat_messages;
    END IF;
END
$$;

-- migrate:down

DROP INDEX idx_chat_messages_content;
CREATE INDEX idx_chat_messages_content ON chat_messages
    USING gin (to_tsvector('english', content));
DROP EXTENSION btree_gin;
