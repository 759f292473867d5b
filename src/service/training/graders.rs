//! Graders without a job: is the description right, and what does it say to a completion?

use std::{
    collections::HashMap,
    sync::LazyLock,
    time::{Duration, Instant},
};

use mote_trainer::{Stop, grader::GradeCall};
use parking_lot::Mutex;
use serde_json::Value;

use super::prepare::build_described;
use crate::{
    service::{Error, ErrorKind, Service, completion::blocking},
    tenant::Caller,
    types::TenantId,
};

/// Graders that run at once for `graders/run`, and those of one tenant: a remote one may take its time.
const MOST_AT_ONCE: usize = 32;
const MOST_OF_TENANT: usize = 4;
/// How long one may take, tries of remote graders included.
const MOST_TIME: Duration = Duration::from_secs(120);

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

/// Whose graders run.
static RUNNING: LazyLock<Mutex<HashMap<TenantId, usize>>> = LazyLock::new(Mutex::default);

/// A place among the graders that run; free again when this is dropped.
struct Place(TenantId);

impl Place {
    fn take(tenant: TenantId) -> Option<Self> {
        let mut running = RUNNING.lock();
        if running.values().sum::<usize>() >= MOST_AT_ONCE {
            return None;
        }
        let own = running.entry(tenant).or_default();
        (*own < MOST_OF_TENANT).then(|| *own += 1).map(|()| Self(tenant))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut running = RUNNING.lock();
        if let Some(own) = running.get_mut(&self.0) {
            *own -= 1;
            if *own == 0 {
                running.remove(&self.0);
            }
        }
    }
}

/// Stops a grader whose client has gone, or waited long enough.
struct StopAtEnd(Stop);

impl Drop for StopAtEnd {
    fn drop(&mut self) {
        self.0.stop();
    }
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
    pub async fn run_grader(
        &self,
        caller: &Caller,
        described: Value,
        item: Value,
        output_text: String,
    ) -> Result<Graded, Error> {
        if !item.is_object() {
            return Err(Error::invalid("item", "'item' must be an object."));
        }
        let config = self.training()?.config().clone();
        let Some(place) = Place::take(caller.tenant) else {
            let mut error = Error::new(ErrorKind::RateLimited, "Too many graders run.").with_code("queue_full");
            error.retry_after = Some(1);
            return Err(error);
        };
        let stop = StopAtEnd(Stop::default());
        let stopped = stop.0.clone();
        let failed = |words: String| Error::invalid("grader", format!("'grader': {words}.")).with_code("grader_failed");
        let work = move || {
            let _place = place;
            let grader = build_described(&described, &config)?;
            grader.check_item(&item).map_err(|words| Error::invalid("item", format!("'item': {words}.")))?;
            let began = Instant::now();
            let graded = grader.grade_batch(&[GradeCall { item: &item, output_text: &output_text }], &stopped);
            let grade = graded.map_err(|(_, error)| failed(error.to_string()))?.pop();
            let grade = grade.ok_or_else(|| Error::internal("a grader gave no grade"))?;
            Ok(Graded { reward: grade.reward, parts: grade.parts, took: began.elapsed() })
        };
        let out = tokio::time::timeout(MOST_TIME, blocking(work)).await;
        drop(stop);
        out.unwrap_or_else(|_| Err(failed(format!("it took longer than {} s", MOST_TIME.as_secs()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_a_few_places_and_they_come_back() {
        let (ann, bob) = (TenantId(70_001), TenantId(70_002));
        let places: Vec<Place> = std::iter::from_fn(|| Place::take(ann)).collect();
        assert_eq!(places.len(), MOST_OF_TENANT);
        assert!(Place::take(bob).is_some());
        drop(places);
        assert!(Place::take(ann).is_some());
    }
}
