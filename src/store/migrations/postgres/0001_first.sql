-- Times are unix seconds. Flags are 0 or 1. `change_seq` rises with every change of a row, in the order of commits, so
-- that a replica can ask for what is new; ids are the change_seq at which a row was made.

CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE counter (id BIGINT PRIMARY KEY CHECK (id = 1), value BIGINT NOT NULL);
INSERT INTO counter (id, value) VALUES (1, 1);

CREATE TABLE tenants (
    id BIGINT PRIMARY KEY,
    name TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    deleted BIGINT NOT NULL DEFAULT 0,
    change_seq BIGINT NOT NULL
);
CREATE UNIQUE INDEX tenants_name ON tenants (name) WHERE deleted = 0;
INSERT INTO tenants (id, name, created_at, change_seq) VALUES (1, 'default', CAST(extract(epoch FROM now()) AS BIGINT), 1);

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant BIGINT NOT NULL REFERENCES tenants (id),
    hash BYTEA NOT NULL UNIQUE,
    prefix TEXT NOT NULL,
    role TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT,
    last_used_at BIGINT,
    change_seq BIGINT NOT NULL
);
CREATE INDEX keys_tenant ON keys (tenant);

-- What adapters' numbers mean, interned: thousands of adapters share a row. `hash` is of all the others but the id.
CREATE TABLE facts (
    id BIGINT PRIMARY KEY,
    hash BYTEA NOT NULL UNIQUE,
    dtype TEXT NOT NULL,
    scheme TEXT NOT NULL,
    frame BYTEA,
    fingerprint BYTEA NOT NULL,
    forced_onto BYTEA
);

-- A deleted adapter stays as a mark without contents, for replicas; `seq` names its current generation.
CREATE TABLE adapters (
    id BIGINT PRIMARY KEY,
    tenant BIGINT NOT NULL REFERENCES tenants (id),
    name TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    public BIGINT NOT NULL,
    metadata TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    deleted BIGINT NOT NULL DEFAULT 0,
    change_seq BIGINT NOT NULL
);
CREATE UNIQUE INDEX adapters_name ON adapters (tenant, name) WHERE deleted = 0;
CREATE UNIQUE INDEX adapters_public ON adapters (name) WHERE public = 1 AND deleted = 0;

CREATE TABLE generations (
    adapter BIGINT NOT NULL REFERENCES adapters (id),
    seq BIGINT NOT NULL,
    generation BYTEA NOT NULL,
    data BYTEA NOT NULL,
    facts BIGINT NOT NULL REFERENCES facts (id),
    created_at BIGINT NOT NULL,
    PRIMARY KEY (adapter, seq)
);

CREATE TABLE idempotency (
    tenant BIGINT NOT NULL REFERENCES tenants (id),
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    request_hash BYTEA NOT NULL,
    response TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (tenant, route, key)
);
CREATE INDEX idempotency_age ON idempotency (created_at);
