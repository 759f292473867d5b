//! From a plan to what the model and the sampler read: the ragged batch, and one question a row of logits.

use std::{collections::HashMap, sync::Arc, time::Instant};

use super::{
    api::{PromptLogProbs, Request},
    gate::Outbox,
    sampler::{Counts, Question},
    scheduler::{Chunk, Plan, Scheduler},
    sequence::{Sequence, SequenceId},
};
use crate::kernel::{BASE_SLOT, SequenceRows, StepBatch};

/// A request as the worker knows it: everything about it that is not the scheduler's.
#[derive(Debug)]
pub(super) struct Job {
    /// What was asked; the prompt is in the sequence.
    pub(super) request: Request,
    /// Where the events go.
    pub(super) outbox: Outbox,
    /// When it came.
    pub(super) submitted: Instant,
    /// What its penalties need.
    pub(super) counts: Option<Counts>,
    /// Log-probs of the prompt so far, until they are sent.
    pub(super) scores: Option<PromptLogProbs>,
}

/// The jobs of the engine.
pub(super) type Jobs = HashMap<SequenceId, Job>;

fn planned<'a>(
    plan: &'a Plan,
    scheduler: &'a Scheduler,
    jobs: &'a Jobs,
) -> impl Iterator<Item = (&'a Chunk, &'a Sequence, &'a Job)> {
    plan.chunks.iter().filter_map(|chunk| Some((chunk, scheduler.get(chunk.id)?, jobs.get(&chunk.id)?)))
}

/// Writes a plan as a batch, replacing what it held.
pub(super) fn build(plan: &Plan, scheduler: &Scheduler, jobs: &Jobs, batch: &mut StepBatch) {
    batch.tokens.clear();
    batch.positions.clear();
    batch.slots.clear();
    batch.cores.clear();
    batch.sequences.clear();
    batch.logits_rows.clear();
    for (chunk, sequence, job) in planned(plan, scheduler, jobs) {
        let first_row = batch.tokens.len();
        let positions = chunk.start..chunk.start + chunk.rows;
        batch.tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
        batch.positions.extend(positions.map(|position| position as u32));
        let slot = slot_of(job, batch);
        batch.slots.resize(batch.tokens.len(), slot);
        let blocks = sequence.blocks.iter().map(|block| block.id()).collect();
        batch.sequences.push(SequenceRows { first_row, rows: chunk.rows, start: chunk.start, blocks });
        let row_of = |position: usize| (first_row + position - chunk.start) as u32;
        batch.logits_rows.extend(chunk.scores.clone().map(row_of));
        if chunk.sample {
            batch.logits_rows.push(row_of(chunk.start + chunk.rows - 1));
        }
    }
}

/// Requests that share their cores share a slot.
fn slot_of(job: &Job, batch: &mut StepBatch) -> u32 {
    let Some(cores) = &job.request.cores else { return BASE_SLOT };
    let known = batch.cores.iter().position(|other| Arc::ptr_eq(other, cores));
    known.unwrap_or_else(|| {
        batch.cores.push(Arc::clone(cores));
        batch.cores.len() - 1
    }) as u32
}

/// What the rows of logits of this plan's batch are asked, in their order: of each chunk its scores, then its sample.
pub(super) fn questions<'a>(plan: &'a Plan, scheduler: &'a Scheduler, jobs: &'a Jobs) -> Vec<Question<'a>> {
    let mut questions = Vec::new();
    for (chunk, sequence, job) in planned(plan, scheduler, jobs) {
        let top = job.request.prompt_logprobs.unwrap_or(0);
        let score = |position: usize| Question::Score { token: sequence.tokens[position + 1], top };
        questions.extend(chunk.scores.clone().map(score));
        if chunk.sample {
            let index = sequence.generated();
            let early = index < job.request.min_tokens;
            questions.push(Question::Next {
                sampling: &job.request.sampling,
                index,
                forbidden: if early { &job.request.stop_tokens } else { &[] },
                counts: job.counts.as_ref(),
                logprobs: job.request.logprobs,
            });
        }
    }
    questions
}
