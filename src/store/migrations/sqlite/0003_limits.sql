-- What an admin set for a tenant. NULL is the server's default, -1 no limit. A tenant's weight is its share of the engine beside the others'.

ALTER TABLE tenants ADD COLUMN max_adapters INTEGER;
ALTER TABLE tenants ADD COLUMN max_stored_bytes INTEGER;
ALTER TABLE tenants ADD COLUMN max_concurrent_requests INTEGER;
ALTER TABLE tenants ADD COLUMN max_requests_per_minute INTEGER;
ALTER TABLE tenants ADD COLUMN max_tokens_per_minute INTEGER;
ALTER TABLE tenants ADD COLUMN max_running_jobs INTEGER;
ALTER TABLE tenants ADD COLUMN max_queued_jobs INTEGER;
ALTER TABLE tenants ADD COLUMN max_trained_tokens_per_day INTEGER;
ALTER TABLE tenants ADD COLUMN weight INTEGER;

-- Days since 1970, UTC. A day without a row was a day without use.
CREATE TABLE tenant_usage (
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    day INTEGER NOT NULL,
    requests INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    trained_tokens INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, day)
) WITHOUT ROWID;

-- Who did what. Appended by the transaction that does it; ids are numbers of the change sequence. Tenants are named and not referred to: entries outlive them.
CREATE TABLE audit (
    id INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    via TEXT NOT NULL,
    tenant TEXT,
    key_id TEXT,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    detail TEXT,
    peer TEXT,
    request_id TEXT
);
