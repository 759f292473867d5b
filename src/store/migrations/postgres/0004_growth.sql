-- A deleted adapter leaves no mark any more. Ended jobs go by their age, facts when nobody has them: the index is for the check of their foreign key.

CREATE INDEX generations_facts ON generations (facts);
CREATE INDEX jobs_finished ON jobs (finished_at);

DELETE FROM adapters WHERE deleted = 1 AND NOT EXISTS (SELECT 1 FROM generations g WHERE g.adapter = adapters.id);
