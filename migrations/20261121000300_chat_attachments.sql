-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

CREATE TABLE chat_attachments (
    id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    tenant_id  text        NOT NULL,
    message_id uuid        NOT NULL,
    file_url   text        NOT NULL,
    file_name  text        NOT NULL,
    file_type  text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT chat_attachments_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_chat_attachments_message FOREIGN KEY (tenant_id, message_id)
        REFERENCES chat_messages (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT chat_attachments_file_url_check CHECK (file_url ~* '^https?://[^/?#[:space:]][^[:space:]]*$'),
    -- Not [:cntrl:], which means something else under each locale.
    CONSTRAINT chat_attachments_file_name_check
        CHECK (file_name <> '' AND file_name !~ '[\u0001-\u001f\u007f-\u009f]'),
    CONSTRAINT chat_attachments_file_type_check CHECK (file_type ~ '^[!-.0-~]+/[!-.0-~]+$')
);

CREATE INDEX idx_chat_attachments_message
    ON chat_attachments (tenant_id, message_id, created_at, id);

-- migrate:down

DROP TABLE chat_attachments;
