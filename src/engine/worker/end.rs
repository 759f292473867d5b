//! How a request ends: done, failed, too late, or deserted.

use std::time::Instant;

use super::Worker;
use crate::engine::{
    api::{Event, FinishReason, Usage},
    batch::Job,
    sequence::SequenceId,
};

impl Worker {
    /// Drops the requests that nobody listens to.
    pub(super) fn cancel_deserted(&mut self) {
        let deserted: Vec<SequenceId> =
            self.jobs.iter().filter(|(_, job)| job.outbox.is_closed()).map(|(&id, _)| id).collect();
        for id in deserted {
            let sequence = self.scheduler.remove(id);
            if let Some(job) = self.jobs.remove(&id) {
                job.trace.end("cancelled", sequence.as_ref());
            }
            self.stats.cancelled.add(1);
        }
    }

    /// Ends the requests whose deadline has come.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |job: &Job| job.request.deadline.is_some_and(|deadline| deadline <= now);
        let expired: Vec<SequenceId> = self.jobs.iter().filter(|(_, job)| late(job)).map(|(&id, _)| id).collect();
        for id in expired {
            let sequence = self.scheduler.remove(id);
            if let Some(job) = self.jobs.remove(&id) {
                self.stats.expired.add(1);
                job.trace.end("expired", sequence.as_ref());
                job.outbox.close(Event::Expired, &mut self.wakes);
            }
        }
    }

    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let (Some(sequence), Some(job)) = (self.scheduler.remove(id), self.jobs.remove(&id)) else { return };
        let usage = Usage {
            prompt_tokens: sequence.prompt,
            completion_tokens: sequence.generated(),
            cached_tokens: sequence.cached.unwrap_or(0),
            preemptions: sequence.preemptions,
        };
        self.stats.finished.add(1);
        job.trace.end(reason.as_str(), Some(&sequence));
        job.outbox.close(Event::Finished(reason, usage), &mut self.wakes);
    }

    pub(super) fn fail(&mut self, id: SequenceId, message: String) {
        self.end_failed(id, "failed", Event::Failed(message));
    }

    pub(super) fn end_failed(&mut self, id: SequenceId, finish: &'static str, event: Event) {
        let sequence = self.scheduler.remove(id);
        if let Some(job) = self.jobs.remove(&id) {
            self.stats.failed.add(1);
            job.trace.end(finish, sequence.as_ref());
            job.outbox.close(event, &mut self.wakes);
        }
    }

    pub(super) fn fail_all(&mut self, message: &str) {
        let ids: Vec<SequenceId> = self.jobs.keys().copied().collect();
        for id in ids {
            self.fail(id, message.to_owned());
        }
    }
}
