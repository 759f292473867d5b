//! A model that says what a script says: after position p comes the script's token p + 1, likelier than all others by far.
//!
//! So the completion of any prompt of n tokens begins at the script's n-th token, and what a test expects can be read off the script.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mote::{
    kernel::{Floats, StepBatch},
    model::{Model, ModelError},
    types::TokenId,
};

/// The model's vocabulary; the tokenizer has 300 tokens.
pub(crate) const VOCAB: usize = 320;
/// The model fails when it reads this token.
pub(crate) const FAILS: TokenId = 319;

/// What a test may do to the model while the engine owns it.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// The model waits for this lock before each step.
    pub(crate) hold: Mutex<()>,
    /// Steps begun.
    pub(crate) steps: AtomicUsize,
    /// Milliseconds that a step takes at least.
    pub(crate) step_ms: AtomicU64,
}

pub(crate) struct Script {
    pub(crate) tokens: Arc<[TokenId]>,
    pub(crate) watch: Arc<Watch>,
}

impl Script {
    /// Raw logits after a position.
    fn logits(&self, position: u32) -> impl Iterator<Item = f32> {
        let next = self.tokens[(position as usize + 1) % self.tokens.len()];
        // Distinct and repeatable, so that the order of alternatives is known.
        let noise = move |id: u32| ((id * 7919 + position * 104_729) % 8191) as f32 / 8191.0;
        (0..VOCAB as u32).map(move |id| match id {
            _ if id == next => 8.0,
            FAILS => -50.0,
            _ => noise(id),
        })
    }
}

impl Model for Script {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn kv_blocks(&self) -> usize {
        128
    }

    fn forward(&mut self, batch: &StepBatch, logits: &mut Floats) -> Result<(), ModelError> {
        drop(self.watch.hold.lock());
        std::thread::sleep(Duration::from_millis(self.watch.step_ms.load(Ordering::SeqCst)));
        self.watch.steps.fetch_add(1, Ordering::SeqCst);
        if batch.tokens.contains(&FAILS) {
            return Err(ModelError::Unsupported("the device is on fire".into()));
        }
        let rows = batch.logits_rows.iter().flat_map(|&row| self.logits(batch.positions[row as usize]));
        logits.set(&rows.collect::<Vec<_>>());
        Ok(())
    }
}
