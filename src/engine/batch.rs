//! From a plan to what the model and the sampler read: the ragged batch, and one question a row of logits.

use std::{collections::HashMap, sync::Arc, time::Instant};

use super::{
    api::{PromptLogProbs, Request},
    gate::Outbox,
    sampler::{Counts, Question},
    scheduler::{Chunk, Plan, Scheduler},
    sequence::SequenceId,
    trace::Trace,
};
use crate::kernel::{BASE_SLOT, Cores, SequenceRows, StepBatch};

/// A request as the worker knows it: everything about it that is not the scheduler's.
#[derive(Debug)]
pub(super) struct Job {
    /// What was asked; the prompt is in the sequence.
    pub(super) request: Request,
    /// Where the events go.
    pub(super) outbox: Outbox,
    /// When it came.
    pub(super) submitted: Instant,
    /// When its last token came.
    pub(super) token_at: Option<Instant>,
    /// What its penalties need.
    pub(super) counts: Option<Counts>,
    /// Log-probs of the prompt so far, until they are sent.
    pub(super) scores: Option<PromptLogProbs>,
    /// Told when it ends.
    pub(super) trace: Trace,
}

/// The jobs of the engine.
pub(super) type Jobs = HashMap<SequenceId, Job>;

/// What a row of logits is about.
#[derive(Debug, Clone, Copy)]
enum Subject {
    /// The prompt token after this position.
    Score(usize),
    /// The next token.
    Next,
}

/// A plan as a batch, and what is asked of it. Reused from step to step: when nothing grows, building allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// What the model reads.
    pub(super) batch: StepBatch,
    /// Of every row of logits, the index of its chunk and what it is about.
    subjects: Vec<(usize, Subject)>,
    /// Slots by the address of the cores, which the batch keeps alive.
    slots: HashMap<usize, u32>,
    /// Block tables of sequences that an earlier, larger step had.
    spare: Vec<Vec<u32>>,
}

impl Step {
    /// Writes a plan as a batch, replacing what it held.
    pub(super) fn build(&mut self, plan: &Plan, scheduler: &Scheduler, jobs: &Jobs) {
        self.clear();
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let (Some(sequence), Some(job)) = (scheduler.get(chunk.id), jobs.get(&chunk.id)) else { continue };
            let batch = &mut self.batch;
            let first_row = batch.tokens.len();
            let positions = chunk.start..chunk.start + chunk.rows;
            batch.tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
            batch.positions.extend(positions.map(|position| position as u32));
            let mut blocks = self.spare.pop().unwrap_or_default();
            blocks.extend(sequence.blocks.iter().map(|block| block.id()));
            batch.sequences.push(SequenceRows { first_row, rows: chunk.rows, start: chunk.start, blocks });
            let row_of = |position: usize| (first_row + position - chunk.start) as u32;
            batch.logits_rows.extend(chunk.scores.clone().map(row_of));
            self.subjects.extend(chunk.scores.clone().map(|position| (index, Subject::Score(position))));
            if chunk.sample {
                batch.logits_rows.push(row_of(chunk.start + chunk.rows - 1));
                self.subjects.push((index, Subject::Next));
            }
            let slot = self.slot_of(job.request.cores.as_ref());
            self.batch.slots.resize(self.batch.tokens.len(), slot);
        }
    }

    fn clear(&mut self) {
        let Self { batch, subjects, slots, spare } = self;
        batch.tokens.clear();
        batch.positions.clear();
        batch.slots.clear();
        batch.cores.clear();
        batch.logits_rows.clear();
        // In reverse, so that a sequence mostly gets the table that it had, which is as long as it needs.
        spare.extend(batch.sequences.drain(..).rev().map(|mut rows| {
            rows.blocks.clear();
            rows.blocks
        }));
        subjects.clear();
        slots.clear();
    }

    /// Requests that share their cores share a slot.
    fn slot_of(&mut self, cores: Option<&Arc<Cores>>) -> u32 {
        let Some(cores) = cores else { return BASE_SLOT };
        let next = self.batch.cores.len() as u32;
        let slot = *self.slots.entry(Arc::as_ptr(cores).addr()).or_insert(next);
        if slot == next {
            self.batch.cores.push(Arc::clone(cores));
        }
        slot
    }

    /// What a row of logits is asked: of each chunk its scores, then its sample. `plan` is what the batch was built from.
    pub(super) fn question<'a>(
        &self,
        plan: &'a Plan,
        scheduler: &'a Scheduler,
        jobs: &'a Jobs,
        row: usize,
    ) -> Option<Question<'a>> {
        let &(index, subject) = self.subjects.get(row)?;
        let chunk: &Chunk = plan.chunks.get(index)?;
        let (sequence, job) = (scheduler.get(chunk.id)?, jobs.get(&chunk.id)?);
        let Subject::Score(position) = subject else {
            let index = sequence.generated();
            let early = index < job.request.min_tokens;
            return Some(Question::Next {
                sampling: &job.request.sampling,
                index,
                forbidden: if early { &job.request.stop_tokens } else { &[] },
                counts: job.counts.as_ref(),
                logprobs: job.request.logprobs,
                scaled: job.request.scaled_logprobs,
            });
        };
        let top = job.request.prompt_logprobs.unwrap_or(0);
        Some(Question::Score { token: sequence.tokens[position + 1], top })
    }
}
