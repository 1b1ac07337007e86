-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- The time of the next change to a row: never before, nor equal to, the last one, whatever the
-- clock does. Evaluated under the row's lock, so that time follows the order of the commits.
CREATE FUNCTION next_change_time(last timestamptz) RETURNS timestamptz
    LANGUAGE sql VOLATILE
    RETURN GREATEST(clock_timestamp(), last + interval '1 microsecond');

CREATE TABLE chat_sessions (
    id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    tenant_id  text        NOT NULL,
    status     text        NOT NULL DEFAULT 'active',
    has_ticket boolean     NOT NULL DEFAULT false,
    -- Incremented under this row's lock by every change to the session or anything under it.
    revision   bigint      NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT chat_sessions_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT chat_sessions_tenant_id_check CHECK (tenant_id <> ''),
    CONSTRAINT chat_sessions_status_check CHECK (status IN ('active', 'resolved', 'archived')),
    CONSTRAINT chat_sessions_revision_check CHECK (revision >= 0)
);

CREATE INDEX idx_chat_sessions_tenant ON chat_sessions (tenant_id, created_at, id);

-- migrate:down

DROP TABLE chat_sessions;
DROP FUNCTION next_change_time(timestamptz);
