-- Training: files that tenants upload, jobs, and what jobs leave behind. Ids are `file-` and `ftjob-` with a UUID of version 7: their order is that of
-- creation. JSON is text; what it says is the service's.

CREATE TABLE files (
    id TEXT PRIMARY KEY,
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    change_seq INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX files_tenant ON files (tenant, id);

-- `attempt` rises each time that a worker takes the job, and `lease` says which process did: a worker writes only under its own attempt. `step` is the highest one reported,
-- `events` the number of the last event.
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    lease TEXT,
    step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL,
    events INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER,
    change_seq INTEGER NOT NULL,
    spec TEXT NOT NULL,
    metrics TEXT,
    result TEXT,
    error TEXT
);
CREATE INDEX jobs_tenant ON jobs (tenant, id);
CREATE INDEX jobs_active ON jobs (status, id) WHERE status IN ('validating', 'queued', 'running', 'paused');
-- The name is reserved while a job may still publish under it.
CREATE UNIQUE INDEX jobs_name ON jobs (tenant, name) WHERE status IN ('validating', 'queued', 'running', 'paused');

-- A job's own copy of its data sets, until it ends.
CREATE TABLE job_data (
    job TEXT NOT NULL REFERENCES jobs (id),
    part TEXT NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (job, part)
);

-- Appended and never changed; numbers begin with 1 and have no gaps.
CREATE TABLE job_events (
    job TEXT NOT NULL REFERENCES jobs (id),
    seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (job, seq)
) WITHOUT ROWID;

CREATE TABLE job_checkpoints (
    job TEXT NOT NULL REFERENCES jobs (id),
    step INTEGER NOT NULL,
    state TEXT NOT NULL,
    metrics TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (job, step)
) WITHOUT ROWID;

CREATE TABLE job_samples (
    job TEXT NOT NULL REFERENCES jobs (id),
    step INTEGER NOT NULL,
    phase TEXT NOT NULL,
    samples TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (job, step, phase)
) WITHOUT ROWID;
