-- How often a job was paused: each time leaves events, so there is a last time.

ALTER TABLE jobs ADD COLUMN pauses INTEGER NOT NULL DEFAULT 0;
