-- What an admin set for a tenant. NULL is the server's default, -1 no limit. A tenant's weight is its share of the engine beside the others'.

ALTER TABLE tenants ADD COLUMN max_adapters BIGINT;
ALTER TABLE tenants ADD COLUMN max_stored_bytes BIGINT;
ALTER TABLE tenants ADD COLUMN max_concurrent_requests BIGINT;
ALTER TABLE tenants ADD COLUMN max_requests_per_minute BIGINT;
ALTER TABLE tenants ADD COLUMN max_tokens_per_minute BIGINT;
ALTER TABLE tenants ADD COLUMN max_running_jobs BIGINT;
ALTER TABLE tenants ADD COLUMN max_queued_jobs BIGINT;
ALTER TABLE tenants ADD COLUMN max_trained_tokens_per_day BIGINT;
ALTER TABLE tenants ADD COLUMN weight BIGINT;

-- Days since 1970, UTC. A day without a row was a day without use.
CREATE TABLE tenant_usage (
    tenant BIGINT NOT NULL REFERENCES tenants (id),
    day BIGINT NOT NULL,
    requests BIGINT NOT NULL DEFAULT 0,
    prompt_tokens BIGINT NOT NULL DEFAULT 0,
    completion_tokens BIGINT NOT NULL DEFAULT 0,
    trained_tokens BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, day)
);

-- Who did what. Appended by the transaction that does it; ids are numbers of the change sequence. Tenants are named and not referred to: entries outlive them.
CREATE TABLE audit (
    id BIGINT PRIMARY KEY,
    at BIGINT NOT NULL,
    via TEXT NOT NULL,
    tenant TEXT,
    key_id TEXT,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    detail TEXT,
    peer TEXT,
    request_id TEXT
);
