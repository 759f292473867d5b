-- Times are unix seconds. Flags are 0 or 1. `change_seq` rises with every change of a row, in the order of commits, so
-- that a replica can ask for what is new; ids are the change_seq at which a row was made.

CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE counter (id INTEGER PRIMARY KEY CHECK (id = 1), value INTEGER NOT NULL);
INSERT INTO counter (id, value) VALUES (1, 1);

CREATE TABLE tenants (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    change_seq INTEGER NOT NULL
);
CREATE UNIQUE INDEX tenants_name ON tenants (name) WHERE deleted = 0;
INSERT INTO tenants (id, name, created_at, change_seq) VALUES (1, 'default', CAST(strftime('%s', 'now') AS INTEGER), 1);

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    hash BLOB NOT NULL UNIQUE,
    prefix TEXT NOT NULL,
    role TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER,
    last_used_at INTEGER,
    change_seq INTEGER NOT NULL
);
CREATE INDEX keys_tenant ON keys (tenant);

-- What adapters' numbers mean, interned: thousands of adapters share a row. `hash` is of all the others but the id.
CREATE TABLE facts (
    id INTEGER PRIMARY KEY,
    hash BLOB NOT NULL UNIQUE,
    dtype TEXT NOT NULL,
    scheme TEXT NOT NULL,
    frame BLOB,
    fingerprint BLOB NOT NULL,
    forced_onto BLOB
);

-- A deleted adapter stays as a mark without contents, for replicas; `seq` names its current generation.
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY,
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    seq INTEGER NOT NULL,
    public INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    change_seq INTEGER NOT NULL
);
CREATE UNIQUE INDEX adapters_name ON adapters (tenant, name) WHERE deleted = 0;
CREATE UNIQUE INDEX adapters_public ON adapters (name) WHERE public = 1 AND deleted = 0;

CREATE TABLE generations (
    adapter INTEGER NOT NULL REFERENCES adapters (id),
    seq INTEGER NOT NULL,
    generation BLOB NOT NULL,
    data BLOB NOT NULL,
    facts INTEGER NOT NULL REFERENCES facts (id),
    created_at INTEGER NOT NULL,
    PRIMARY KEY (adapter, seq)
) WITHOUT ROWID;

CREATE TABLE idempotency (
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    request_hash BLOB NOT NULL,
    response TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (tenant, route, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (created_at);
