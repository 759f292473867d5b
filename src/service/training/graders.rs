//! Graders without a job: is the description right, and what does it say to a completion?

use std::time::{Duration, Instant};

use mote_trainer::grader::GradeCall;
use serde_json::Value;
use tokio::sync::Semaphore;

use super::prepare::build_described;
use crate::service::{Error, ErrorKind, Service, completion::blocking};

/// Graders that run at once for `graders/run`: a remote one may take its time.
const MOST_AT_ONCE: usize = 8;
static PLACES: Semaphore = Semaphore::const_new(MOST_AT_ONCE);

/// What a grader said.
#[derive(Debug, Clone, PartialEq)]
pub struct Graded {
    /// The score.
    pub reward: f32,
    /// The scores that a combined one was made of.
    pub parts: Vec<(String, f32)>,
    /// How long it took.
    pub took: Duration,
}

impl Service {
    /// Checks a grader's description.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn validate_grader(&self, described: &Value) -> Result<(), Error> {
        build_described(described, self.training()?.config()).map(|_| ())
    }

    /// Grades one completion.
    ///
    /// # Errors
    /// 400 that names the field, or says why the completion cannot be graded; 429 when too many run.
    pub async fn run_grader(&self, described: Value, item: Value, output_text: String) -> Result<Graded, Error> {
        if !item.is_object() {
            return Err(Error::invalid("item", "'item' must be an object."));
        }
        let config = self.training()?.config().clone();
        let Ok(place) = PLACES.try_acquire() else {
            let mut error = Error::new(ErrorKind::RateLimited, "Too many graders run.").with_code("queue_full");
            error.retry_after = Some(1);
            return Err(error);
        };
        let work = move || {
            let _place = place;
            let grader = build_described(&described, &config)?;
            grader.check_item(&item).map_err(|words| Error::invalid("item", format!("'item': {words}.")))?;
            let began = Instant::now();
            let grade = grader.grade(GradeCall { item: &item, output_text: &output_text });
            let grade = grade
                .map_err(|error| Error::invalid("grader", format!("'grader': {error}.")).with_code("grader_failed"))?;
            Ok(Graded { reward: grade.reward, parts: grade.parts, took: began.elapsed() })
        };
        blocking(work).await
    }
}
