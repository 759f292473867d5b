//! Why a run cannot go on.

use crate::{data::Place, grader::GraderError, policy::PolicyError};

/// Why a step or an evaluation gave no result. The run is as it was before the step: what was tried can be tried again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrainError {
    /// [`crate::Stop`] was asked for: pause, cancel, shutdown.
    #[error("stopped")]
    Stopped,
    /// The model could not roll out or differentiate.
    #[error("the model failed: {0}")]
    Policy(String),
    /// A completion could not be graded.
    #[error("the grader failed on an answer to {place}: {message}")]
    Grader {
        /// The item's place in the data.
        place: Place,
        /// The grader's words.
        message: String,
    },
    /// A number that is not one.
    #[error("step {step}: {what} is not finite; a smaller learning rate may help")]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// What is not finite.
        what: &'static str,
    },
    /// The run is over.
    #[error("the run has ended")]
    Ended,
    /// A run that cannot be: numbers, data and settings do not fit each other.
    #[error("{0}")]
    Invalid(String),
}

impl From<PolicyError> for TrainError {
    fn from(error: PolicyError) -> Self {
        match error {
            PolicyError::Stopped => Self::Stopped,
            PolicyError::Failed(message) => Self::Policy(message),
        }
    }
}

impl TrainError {
    pub(crate) fn grader(place: Place, error: GraderError) -> Self {
        match error {
            GraderError::Stopped => Self::Stopped,
            GraderError::Failed(message) => Self::Grader { place, message },
        }
    }
}
