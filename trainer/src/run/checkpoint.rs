//! Checkpoints: everything a run is, exactly.

use serde::{Deserialize, Serialize};

use super::{End, Monitor};
use crate::{bits, data::Dataset, optimizer::Adam, settings::Settings};

const VERSION: u32 = 1;

/// What changes from step to step. The position in every random stream is among it: streams are keyed by step and by prompts drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Prompts drawn from the endless sequence of shuffled epochs.
    pub drawn: u64,
    /// The master numbers, `[numbers]`.
    #[serde(with = "bits")]
    pub numbers: Vec<f32>,
    /// The optimiser.
    pub adam: Adam,
    /// What early stopping remembers.
    pub(super) monitor: Monitor,
    /// Why the run is over, once it is.
    pub end: Option<End>,
}

/// A checkpoint, for any serde format that keeps f64 exactly (serde_json with `float_roundtrip` does).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    version: u32,
    settings: Settings,
    /// The data's digest, 16 hexadecimal digits (JSON's numbers end at 2^53).
    data: String,
    /// Where the run stands.
    pub state: State,
}

/// A checkpoint of another run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the checkpoint cannot be used: {0}")]
pub struct CheckpointError(pub String);

impl Checkpoint {
    pub(super) fn new(settings: &Settings, data: &Dataset, state: &State) -> Self {
        let data = format!("{:016x}", data.digest());
        Self { version: VERSION, settings: settings.clone(), data, state: state.clone() }
    }

    pub(super) fn into_state(self, settings: &Settings, data: &Dataset) -> Result<State, CheckpointError> {
        let fail = |message: String| Err(CheckpointError(message));
        if self.version != VERSION {
            return fail(format!("it is of version {}, not {VERSION}", self.version));
        }
        if self.settings != *settings {
            return fail("it was made with other settings".to_owned());
        }
        if self.data != format!("{:016x}", data.digest()) {
            return fail("it was made with other data".to_owned());
        }
        let state = self.state;
        if [state.adam.first.len(), state.adam.second.len()] != [state.numbers.len(); 2] {
            return fail("the optimiser's moments are not as many as the numbers".to_owned());
        }
        Ok(state)
    }
}
