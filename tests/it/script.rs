//! A model that says what a script says: after position p comes the script's token p + 1, likelier than all others by far.
//!
//! So the completion of any prompt of n tokens begins at the script's n-th token, and what a test expects can be read off the script.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use mote::{
    kernel::StepBatch,
    model::{Model, ModelError},
    types::TokenId,
};

/// The model's vocabulary; the tokenizer has 300 tokens.
pub const VOCAB: usize = 320;
/// A prompt that holds this token fails in the model.
pub const FAILS: TokenId = 319;
/// The position after which the model fails: half-way through a completion.
pub const BREAKS_AT: u32 = 240;

/// What a test may do to the model while the engine owns it.
#[derive(Debug, Default)]
pub struct Watch {
    /// The model waits for this lock before each step.
    pub hold: Mutex<()>,
    /// Steps begun.
    pub steps: AtomicUsize,
}

pub struct Script {
    pub tokens: Arc<[TokenId]>,
    pub watch: Arc<Watch>,
}

impl Script {
    /// Raw logits after a position.
    fn logits(&self, position: u32) -> impl Iterator<Item = f32> {
        let next = self.tokens[(position as usize + 1) % self.tokens.len()];
        // Distinct and repeatable, so that the order of alternatives is known.
        let noise = move |id: u32| ((id * 7919 + position * 104_729) % 8191) as f32 / 8191.0;
        (0..VOCAB as u32).map(move |id| if id == next { 8.0 } else { noise(id) })
    }
}

impl Model for Script {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn kv_blocks(&self) -> usize {
        128
    }

    fn forward(&mut self, batch: &StepBatch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        drop(self.watch.hold.lock());
        self.watch.steps.fetch_add(1, Ordering::SeqCst);
        if batch.tokens.contains(&FAILS) || batch.positions.contains(&BREAKS_AT) {
            return Err(ModelError::Unsupported("the device is on fire".into()));
        }
        logits.clear();
        for &row in &batch.logits_rows {
            logits.extend(self.logits(batch.positions[row as usize]));
        }
        Ok(())
    }
}
