-- migrate:up

-- A migration that waits for a lock holds up everybody behind it: give up instead.
SET LOCAL lock_timeout = '5s';

-- The histories of this database, in order. A new one begins when a standby is promoted or a backup is
-- restored: changes can be lost then, and revisions and transaction ids are given again. The last row
-- is the current one.
CREATE TABLE chat_epochs (
    ordinal        bigint      NOT NULL,
    -- Random: two restores of one backup begin two epochs.
    id             text        NOT NULL DEFAULT left(replace(gen_random_uuid()::text, '-', ''), 16),
    -- What database it is: see chat_database_identity.
    identity       text        NOT NULL,
    -- Of this table when the epoch began. It is another one when the tables were restored from a dump.
    table_oid      oid         NOT NULL,
    -- Where recovery ended when the epoch began, by a promotion or a restore to a point in time. NULL
    -- where it is not known what of the epoch before is missing.
    branch_lsn     pg_lsn,
    -- Tombstones below this feed_position may have been swept.
    swept_position bigint      NOT NULL DEFAULT 0,
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT chat_epochs_pkey PRIMARY KEY (ordinal),
    -- An ordinal and a transaction id fit into a bigint together.
    CONSTRAINT chat_epochs_ordinal_check CHECK (ordinal BETWEEN 1 AND 32767),
    CONSTRAINT chat_epochs_id_check CHECK (id ~ '^[0-9a-f]{16}$')
);

-- "SYSTEM IDENTIFIER/TIMELINE/DATABASE". Every role may ask for these, unless the provider of a
-- managed service has revoked it or has no WAL as PostgreSQL has: then a part is `?`. The timeline is
-- that of the WAL which is written now; pg_control_checkpoint has the old one for a while after a
-- promotion.
CREATE FUNCTION chat_database_identity() RETURNS text
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    system_identifier text := '?';
    timeline          text := '?';
BEGIN
    BEGIN
        system_identifier := (SELECT c.system_identifier FROM pg_control_system() AS c);
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    BEGIN
        timeline := left(pg_walfile_name(pg_current_wal_insert_lsn()), 8);
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    RETURN format('%s/%s/%s', system_identifier, timeline,
                  (SELECT oid FROM pg_database WHERE datname = current_database()));
END
$$;

-- The identity after one promotion, or one restore to a point in time. NULL if a part is not known.
CREATE FUNCTION chat_next_identity(identity text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN CASE WHEN identity NOT LIKE '%?%'
                THEN regexp_replace(identity, '/.*/', format('/%s/', upper(lpad(to_hex(
                         ('x' || split_part(identity, '/', 2))::bit(32)::bigint + 1), 8, '0')))) END;

-- The end of the last record of the WAL, in bytes: what is visible now was written before it. NULL where
-- a managed service has no WAL as PostgreSQL has.
--
-- PostgreSQL says where the next record begins: after a page that is full, behind the header of the next.
CREATE FUNCTION chat_wal_position() RETURNS bigint
    LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    segment_size   bigint := pg_size_bytes(current_setting('wal_segment_size'));
    page_size      bigint := current_setting('wal_block_size');
    next_record    bigint;
    offset_in_page bigint;
    page           bigint;
BEGIN
    next_record := pg_current_wal_insert_lsn() - '0/0';
    offset_in_page := next_record % page_size;
    page := next_record - offset_in_page;
    RETURN CASE WHEN offset_in_page = CASE page % segment_size WHEN 0 THEN 40 ELSE 24 END
                THEN page ELSE next_record END;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$$;

-- Whether a crash keeps the WAL up to a position. A transaction that was rolled back, or that wrote
-- nothing, does not wait for that. If its record is lost, its id is given again.
--
-- Without synchronous_commit, a crash loses changes anyway.
CREATE FUNCTION chat_wal_is_flushed(wal_position bigint) RETURNS boolean
    LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN current_setting('synchronous_commit') = 'off'
        OR coalesce(pg_current_wal_flush_lsn() - '0/0' >= wal_position, true);
EXCEPTION WHEN OTHERS THEN
    RETURN true;
END
$$;

-- Where the recovery ended that made this server a primary. NULL if that is not known.
--
-- A server that has crashed since then has replayed its own WAL last. It has no time of a replayed
-- transaction, as a standby has, and a server that was restored to a point in time.
CREATE FUNCTION chat_recovery_end() RETURNS pg_lsn
    LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN CASE WHEN pg_last_xact_replay_timestamp() IS NOT NULL THEN pg_last_wal_replay_lsn() END;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$$;

-- Begins an epoch. By hand, only after a restore that PostgreSQL itself cannot tell: of a snapshot of
-- the volume, or of data into the tables that are there. Writers wait until the transaction ends. It
-- reads all sessions and tickets, as restored ones may have positions of epochs that are not here.
CREATE FUNCTION begin_chat_epoch() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    LOCK TABLE chat_sessions, tickets IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO chat_epochs (ordinal, identity, table_oid)
    SELECT greatest(
               0,
               (SELECT max(ordinal) FROM chat_epochs),
               (SELECT max(feed_position) >> 48 FROM chat_sessions),
               (SELECT max(feed_position) >> 48 FROM tickets),
               (SELECT max(feed_position) >> 48 FROM chat_session_tombstones),
               (SELECT max(feed_position) >> 48 FROM ticket_tombstones)
           ) + 1, chat_database_identity(), 'chat_epochs'::regclass;
END
$$;

-- The current epoch. It begins here when the database is another one than that of the last epoch.
--
-- What a database is does not change while a backend lives that may write. So each backend asks once,
-- and keeps the answer in a setting of its own, which outlives the transaction.
CREATE FUNCTION current_chat_epoch() RETURNS chat_epochs
    LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    current_identity text := chat_database_identity();
    last_epoch       chat_epochs;
BEGIN
    PERFORM set_config('chat_ticket.database_identity', current_identity, false);
    LOOP
        SELECT * INTO last_epoch FROM chat_epochs ORDER BY ordinal DESC LIMIT 1;
        IF last_epoch.identity = current_identity
           AND last_epoch.table_oid = 'chat_epochs'::regclass
        THEN
            RETURN last_epoch;
        END IF;
        -- Of several at the same time, one begins it, and the others find it when it is committed.
        INSERT INTO chat_epochs (ordinal, identity, table_oid, branch_lsn)
        VALUES (coalesce(last_epoch.ordinal, 0) + 1, current_identity, 'chat_epochs'::regclass,
                -- Recovery ended the last epoch only if this is the next timeline of its database.
                CASE WHEN last_epoch.table_oid = 'chat_epochs'::regclass
                      AND current_identity = chat_next_identity(last_epoch.identity)
                     THEN chat_recovery_end() END)
            ON CONFLICT (ordinal) DO NOTHING;
    END LOOP;
END
$$;

-- The position of a change in the feed: the epoch, and the transaction in it. The order of transaction
-- ids is not that of the commits. But all below pg_snapshot_xmin have ended, so a reader that tells
-- changes up to there has told all of them.
CREATE FUNCTION chat_feed_position(epoch_ordinal bigint, xid xid8) RETURNS bigint
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN (epoch_ordinal << 48) | xid::text::bigint;

-- The position of the change that this transaction makes.
CREATE FUNCTION current_feed_position() RETURNS bigint
    LANGUAGE plpgsql AS $$
DECLARE
    last_epoch record;
BEGIN
    SELECT e.ordinal, e.identity, e.table_oid, e.tableoid AS current_oid INTO last_epoch
      FROM chat_epochs e ORDER BY e.ordinal DESC LIMIT 1;
    IF last_epoch.identity = current_setting('chat_ticket.database_identity', true)
       AND last_epoch.table_oid = last_epoch.current_oid
    THEN
        RETURN chat_feed_position(last_epoch.ordinal, pg_current_xact_id());
    END IF;
    RETURN chat_feed_position((current_chat_epoch()).ordinal, pg_current_xact_id());
END
$$;

-- The migration begins the first epoch.
SELECT current_chat_epoch();

-- Existing rows count as changed at the beginning of the first epoch. A default that is a constant
-- writes no row.
DO $$
DECLARE
    start    bigint := chat_feed_position(1, '0');
    epoch_id text := (SELECT id FROM chat_epochs);
    feed     regclass;
BEGIN
    EXECUTE format(
        -- As in the request `epoch`: FIRST REVISION.EPOCH of each epoch in which the session has
        -- changed, with a hyphen between them.
        'ALTER TABLE chat_sessions ADD COLUMN epoch text NOT NULL DEFAULT %L,
         ADD COLUMN filter_position bigint NOT NULL DEFAULT %s', '0.' || epoch_id, start
    );
    ALTER TABLE chat_sessions
        ALTER COLUMN epoch DROP DEFAULT,
        ALTER COLUMN filter_position DROP DEFAULT;
    FOREACH feed IN ARRAY ARRAY['chat_sessions', 'tickets', 'chat_session_tombstones']::regclass[]
    LOOP
        EXECUTE format('ALTER TABLE %s ADD COLUMN feed_position bigint NOT NULL DEFAULT %s,
                        ADD COLUMN feed_bucket bigint NOT NULL DEFAULT %s', feed, start, start >> 16);
        EXECUTE format('ALTER TABLE %s ALTER COLUMN feed_position DROP DEFAULT,
                        ALTER COLUMN feed_bucket DROP DEFAULT', feed);
    END LOOP;
END
$$;

-- What the status, the ticket and the labels were before their last change (at filter_position), as
-- far as they changed then, and the filter_position of that. So a follower of the feed learns which
-- sessions have left its filter. NULL until the first change.
ALTER TABLE chat_sessions ADD COLUMN filter_before jsonb;

-- A deleted ticket, until servers sweep it. It has nothing of what the ticket was.
CREATE TABLE ticket_tombstones (
    tenant_id     text        NOT NULL,
    ticket_id     uuid        NOT NULL,
    deleted_at    timestamptz NOT NULL DEFAULT now(),
    feed_position bigint      NOT NULL,
    feed_bucket   bigint      NOT NULL,
    CONSTRAINT ticket_tombstones_pkey PRIMARY KEY (tenant_id, ticket_id)
);

CREATE INDEX idx_ticket_tombstones_deleted ON ticket_tombstones (deleted_at);

-- Its tenant_id is ordered as everywhere (see set_tenant_collation).
DO $$
BEGIN
    EXECUTE format(
        'ALTER TABLE ticket_tombstones ALTER COLUMN tenant_id TYPE text COLLATE %s', (
            SELECT quote_ident(nspname) || '.' || quote_ident(collname)
              FROM pg_attribute a
              JOIN pg_collation c ON c.oid = a.attcollation
              JOIN pg_namespace n ON n.oid = c.collnamespace
             WHERE attrelid = 'chat_sessions'::regclass AND attname = 'tenant_id'
        )
    );
END
$$;

-- These are triggers, so that the changes of an older server count too.

-- The bucket is what the index of the feed has: a row that changes within 65,536 transactions of its
-- last change is updated in place (HOT).
CREATE FUNCTION take_feed_position() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    NEW.feed_position := current_feed_position();
    -- See chat_sessions_take_feed_position. OLD is NULL when a row is inserted.
    NEW.feed_bucket := greatest(OLD.feed_bucket, NEW.feed_position >> 16);
    RETURN NEW;
END
$$;

CREATE TRIGGER tickets_take_feed_position BEFORE INSERT OR UPDATE ON tickets
    FOR EACH ROW EXECUTE FUNCTION take_feed_position();
CREATE TRIGGER chat_session_tombstones_take_feed_position BEFORE INSERT ON chat_session_tombstones
    FOR EACH ROW EXECUTE FUNCTION take_feed_position();
CREATE TRIGGER ticket_tombstones_take_feed_position
    BEFORE INSERT OR UPDATE OF deleted_at ON ticket_tombstones
    FOR EACH ROW EXECUTE FUNCTION take_feed_position();

-- As current_feed_position, which each message would have to call.
CREATE FUNCTION chat_sessions_take_feed_position() RETURNS trigger
    LANGUAGE plpgsql AS $$
DECLARE
    last_epoch record;
BEGIN
    SELECT e.ordinal, e.id, e.identity, e.table_oid, e.tableoid AS current_oid INTO last_epoch
      FROM chat_epochs e ORDER BY e.ordinal DESC LIMIT 1;
    IF NOT FOUND
       OR last_epoch.identity IS DISTINCT FROM current_setting('chat_ticket.database_identity', true)
       OR last_epoch.table_oid <> last_epoch.current_oid
    THEN
        last_epoch := current_chat_epoch();
    END IF;
    NEW.feed_position :=
        (last_epoch.ordinal << 48) | pg_current_xact_id()::text::bigint;
    NEW.feed_bucket := NEW.feed_position >> 16;
    IF TG_OP = 'INSERT' THEN
        -- One that is restored as data has epochs already.
        NEW.epoch := coalesce(NEW.epoch, '0.' || last_epoch.id);
        NEW.filter_position := NEW.feed_position;
        NEW.filter_before := NULL;
    ELSE
        -- A long transaction can have a lower position than one that has changed the row before. A row
        -- that went back in the index would be passed over by those who are reading it.
        NEW.feed_bucket := greatest(OLD.feed_bucket, NEW.feed_bucket);
        IF right(OLD.epoch, 16) <> last_epoch.id THEN
            NEW.epoch := OLD.epoch || '-' || (OLD.revision + 1) || '.' || last_epoch.id;
        END IF;
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER chat_sessions_take_feed_position BEFORE INSERT OR UPDATE ON chat_sessions
    FOR EACH ROW EXECUTE FUNCTION chat_sessions_take_feed_position();

-- Runs after chat_sessions_take_feed_position, as triggers run in the order of their names.
CREATE FUNCTION chat_sessions_take_filter_position() RETURNS trigger
    LANGUAGE plpgsql AS $$
DECLARE
    before jsonb := '{}';
BEGIN
    IF OLD.status <> NEW.status THEN
        before := jsonb_build_object('status', OLD.status);
    END IF;
    IF OLD.has_ticket <> NEW.has_ticket THEN
        before := before || jsonb_build_object('has_ticket', OLD.has_ticket);
    END IF;
    IF OLD.labels IS DISTINCT FROM NEW.labels THEN
        before := before || jsonb_build_object('labels', coalesce(OLD.labels, '{}'));
    END IF;
    IF OLD.filter_position <> NEW.feed_position THEN
        NEW.filter_before := before || jsonb_build_object('position', OLD.filter_position);
    ELSE
        -- The second change of one transaction. NULL stays: this transaction has created the session.
        NEW.filter_before := before || OLD.filter_before;
    END IF;
    NEW.filter_position := NEW.feed_position;
    RETURN NEW;
END
$$;

CREATE TRIGGER chat_sessions_take_filter_position
    BEFORE UPDATE OF status, has_ticket, labels ON chat_sessions
    FOR EACH ROW
    WHEN ((OLD.status, OLD.has_ticket, OLD.labels)
          IS DISTINCT FROM (NEW.status, NEW.has_ticket, NEW.labels))
    EXECUTE FUNCTION chat_sessions_take_filter_position();

-- A ticket id that is used again, against the rules, gets a new tombstone when it is deleted again.
CREATE FUNCTION tickets_leave_tombstones() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO ticket_tombstones AS t (tenant_id, ticket_id)
    SELECT tenant_id, id FROM deleted
        ON CONFLICT (tenant_id, ticket_id) DO UPDATE SET deleted_at = now();
    RETURN NULL;
END
$$;

CREATE TRIGGER tickets_leave_tombstones
    AFTER DELETE ON tickets REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION tickets_leave_tombstones();

-- The functions look for the tables where they are themselves, be it `public` or another schema.
-- The search_path names pg_temp last, so that no temporary table stands in for one of ours.
DO $$
DECLARE
    rule regprocedure;
BEGIN
    FOREACH rule IN ARRAY ARRAY[
        'begin_chat_epoch()',
        'current_chat_epoch()',
        'current_feed_position()',
        'take_feed_position()',
        'chat_sessions_take_feed_position()',
        'tickets_leave_tombstones()'
    ]::regprocedure[] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', rule, (
            SELECT nspname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
             WHERE pg_proc.oid = rule
        ));
    END LOOP;
END
$$;

REVOKE EXECUTE ON FUNCTION begin_chat_epoch() FROM PUBLIC;

-- Whoever may use the sessions may use these: a role that serves does not own the tables.
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
           AND grantee <> (SELECT relowner FROM pg_class WHERE oid = 'chat_epochs'::regclass)
         GROUP BY grantee, privilege_type
    LOOP
        EXECUTE format('GRANT %s ON chat_epochs, ticket_tombstones TO %s%s',
                       granted.privilege_type, granted.role, granted.option);
    END LOOP;
END
$$;

-- As before, and for the tombstones of tickets too.
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
        'tickets', 'chat_tickets', 'tenant_settings', 'chat_drafts', 'chat_draft_pieces',
        'chat_session_tombstones', 'ticket_tombstones'
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

DROP TRIGGER tickets_leave_tombstones ON tickets;
DROP TRIGGER chat_sessions_take_filter_position ON chat_sessions;
DROP TRIGGER chat_sessions_take_feed_position ON chat_sessions;
DROP TRIGGER chat_session_tombstones_take_feed_position ON chat_session_tombstones;
DROP TRIGGER tickets_take_feed_position ON tickets;
DROP TABLE ticket_tombstones;
ALTER TABLE chat_session_tombstones
    DROP COLUMN feed_bucket,
    DROP COLUMN feed_position;
ALTER TABLE tickets
    DROP COLUMN feed_bucket,
    DROP COLUMN feed_position;
ALTER TABLE chat_sessions
    DROP COLUMN filter_before,
    DROP COLUMN filter_position,
    DROP COLUMN epoch,
    DROP COLUMN feed_bucket,
    DROP COLUMN feed_position;
DROP FUNCTION tickets_leave_tombstones();
DROP FUNCTION chat_sessions_take_filter_position();
DROP FUNCTION chat_sessions_take_feed_position();
DROP FUNCTION take_feed_position();
DROP FUNCTION current_feed_position();
DROP FUNCTION chat_feed_position(bigint, xid8);
DROP FUNCTION begin_chat_epoch();
DROP FUNCTION current_chat_epoch();
DROP FUNCTION chat_recovery_end();
DROP FUNCTION chat_wal_is_flushed(bigint);
DROP FUNCTION chat_wal_position();
DROP FUNCTION chat_next_identity(text);
DROP FUNCTION chat_database_identity();
DROP TABLE chat_epochs;

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
        'tickets', 'chat_tickets', 'tenant_settings', 'chat_drafts', 'chat_draft_pieces',
        'chat_session_tombstones'
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

