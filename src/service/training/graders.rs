//! Graders without a job: is the description right, and what does it say to a completion?

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mote_trainer::{Stop, grader::GradeCall};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::prepare::build_described;
use crate::{
    service::{Error, ErrorKind, Service, completion::blocking},
    tenant::{Caller, Places},
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

/// The places of graders that run without a job.
pub(in crate::service) struct GraderPlaces {
    of_all: Arc<Semaphore>,
    of_tenants: Places,
}

impl Default for GraderPlaces {
    fn default() -> Self {
        Self { of_all: Arc::new(Semaphore::new(MOST_AT_ONCE)), of_tenants: Places::new(MOST_OF_TENANT) }
    }
}

impl GraderPlaces {
    /// A place until this is dropped, or none: nobody waits.
    fn take(&self, tenant: TenantId) -> Option<[OwnedSemaphorePermit; 2]> {
        let own = self.of_tenants.of(tenant).try_acquire_owned().ok()?;
        Some([own, self.of_all.clone().try_acquire_owned().ok()?])
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
        let Some(place) = self.grader_places.take(caller.tenant) else {
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
    fn a_tenant_has_a_few_places_of_all_and_they_come_back() {
        let all = GraderPlaces::default();
        let mut held = Vec::new();
        for tenant in 0..8 {
            let own: Vec<_> = std::iter::from_fn(|| all.take(TenantId(tenant))).collect();
            assert_eq!(own.len(), MOST_OF_TENANT);
            held.extend(own);
        }
        assert_eq!(held.len(), MOST_AT_ONCE);
        assert!(all.take(TenantId(8)).is_none());
        held.pop();
        assert!(all.take(TenantId(8)).is_some());
        assert!(all.take(TenantId(0)).is_none(), "it has all of its own");
    }
}
