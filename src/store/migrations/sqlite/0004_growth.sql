-- A deleted adapter leaves no mark any more. Ended jobs go by their age.

CREATE INDEX jobs_finished ON jobs (finished_at);

DELETE FROM adapters WHERE deleted = 1 AND NOT EXISTS (SELECT 1 FROM generations g WHERE g.adapter = adapters.id);
