//! Graders: what gives a completion its reward.

mod config;
mod expression;
mod json_schema;
mod length;
mod multi;
mod number;
mod pattern;
mod remote;
mod similarity;
mod string_check;

use serde_json::Value;

pub use config::{GraderConfigError, build};
pub use number::{Extract, extract_number};
pub use remote::{ConnectRemote, NoRemote, RemoteSpec};

use crate::{
    data::{DataError, DataErrors, Dataset, collect},
    policy::Stop,
    template::{Scope, Template},
};

/// A grader's verdict.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Grade {
    /// The score, finite, usually in `0..=1`.
    pub reward: f32,
    /// The scores a combined one was made of, by name.
    pub parts: Vec<(String, f32)>,
}

impl Grade {
    /// A score alone.
    pub fn of(reward: f32) -> Self {
        Self { reward, parts: Vec::new() }
    }

    /// 1 or 0.
    pub(crate) fn pass(passed: bool) -> Self {
        Self::of(f32::from(u8::from(passed)))
    }
}

/// A completion could not be graded. This is an error of the job, never a reward of zero.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GraderError {
    /// [`Stop`] was asked for.
    #[error("stopped")]
    Stopped,
    /// The words are for the job's owner.
    #[error("{0}")]
    Failed(String),
}

/// One completion to grade.
#[derive(Debug, Clone, Copy)]
pub struct GradeCall<'a> {
    /// The dataset's object.
    pub item: &'a Value,
    /// The completion's text.
    pub output_text: &'a str,
}

impl<'a> GradeCall<'a> {
    /// A template's text for this completion.
    pub(crate) fn render(&self, template: &Template) -> Result<String, GraderError> {
        let scope = Scope { item: self.item, output_text: Some(self.output_text) };
        template.render(scope).map_err(|error| GraderError::Failed(error.to_string()))
    }
}

/// Gives completions their rewards.
pub trait Grader: Send + Sync {
    /// Grades one completion.
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError>;

    /// Grades many, in their order. On a mistake its index comes with it. A grader that waits for somebody else does many at once, and looks at `stop` while it waits.
    fn grade_batch(&self, calls: &[GradeCall<'_>], stop: &Stop) -> Result<Vec<Grade>, (usize, GraderError)> {
        let mut grades = Vec::with_capacity(calls.len());
        for (index, call) in calls.iter().enumerate() {
            if stop.is_stopped() {
                return Err((index, GraderError::Stopped));
            }
            grades.push(self.grade(*call).map_err(|error| (index, error))?);
        }
        Ok(grades)
    }

    /// Can completions of this item be graded at all? Asked of every item before a job starts.
    fn check_item(&self, item: &Value) -> Result<(), String>;
}

/// Asks the grader about every example; the mistakes name their lines.
pub fn check_dataset(grader: &dyn Grader, data: &Dataset) -> Result<(), DataErrors> {
    collect(data.examples.iter(), |example| {
        grader
            .check_item(&example.fields)
            .map_err(|message| DataError::new(example.place, None, format!("the grader cannot use it: {message}")))
    })
    .map(|_| ())
}
