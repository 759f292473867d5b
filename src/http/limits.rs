//! A tenant's limits as objects of the admin API.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::{
    service::Error,
    tenant::{Bound, LimitChanges, Limits, MAX_WEIGHT, Overrides},
};

/// What holds for a tenant. Null: no limit.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct LimitsObject {
    /// Adapters.
    #[schema(required = true)]
    adapters: Option<u64>,
    /// Bytes of adapters (numbers of every generation, the frame of an imported one, and metadata), files, and jobs with their data together.
    #[schema(required = true)]
    stored_bytes: Option<u64>,
    /// Requests to metered routes at once; a stream is one until it ends.
    #[schema(required = true)]
    concurrent_requests: Option<u64>,
    /// Requests to metered routes a minute.
    #[schema(required = true)]
    requests_per_minute: Option<u64>,
    /// Prompt and completion tokens a minute. A request reserves its prompt and `max_tokens` for each choice (`n`, `best_of`), and what it did not use
    /// comes back at its end.
    #[schema(required = true)]
    tokens_per_minute: Option<u64>,
    /// Training jobs that run at once.
    #[schema(required = true)]
    running_jobs: Option<u64>,
    /// Training jobs under way: queued, running or paused.
    #[schema(required = true)]
    queued_jobs: Option<u64>,
    /// Tokens of completions and demonstrations that jobs may train on in a day (UTC); then they go on the next day.
    #[schema(required = true)]
    trained_tokens_per_day: Option<u64>,
    /// Its share of the engine beside the other tenants'.
    weight: u32,
}

impl From<Limits> for LimitsObject {
    fn from(limits: Limits) -> Self {
        let Limits { adapters, stored_bytes, concurrent_requests, requests_per_minute, .. } = limits;
        let Limits { tokens_per_minute, running_jobs, queued_jobs, trained_tokens_per_day, weight, .. } = limits;
        Self {
            adapters,
            stored_bytes,
            concurrent_requests,
            requests_per_minute,
            tokens_per_minute,
            running_jobs,
            queued_jobs,
            trained_tokens_per_day,
            weight,
        }
    }
}

/// What was set for a tenant. Null: the server's default holds; -1: no limit.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OverridesObject {
    /// Adapters.
    #[schema(required = true)]
    adapters: Option<i64>,
    /// Bytes of adapters, files and jobs.
    #[schema(required = true)]
    stored_bytes: Option<i64>,
    /// Requests at once.
    #[schema(required = true)]
    concurrent_requests: Option<i64>,
    /// Requests a minute.
    #[schema(required = true)]
    requests_per_minute: Option<i64>,
    /// Tokens a minute.
    #[schema(required = true)]
    tokens_per_minute: Option<i64>,
    /// Training jobs that run at once.
    #[schema(required = true)]
    running_jobs: Option<i64>,
    /// Training jobs under way.
    #[schema(required = true)]
    queued_jobs: Option<i64>,
    /// Tokens to train on in a day.
    #[schema(required = true)]
    trained_tokens_per_day: Option<i64>,
    /// Its share of the engine.
    #[schema(required = true)]
    weight: Option<u32>,
}

impl From<Overrides> for OverridesObject {
    fn from(set: Overrides) -> Self {
        let number = |bound: Option<Bound>| bound.map(Bound::number);
        Self {
            adapters: number(set.adapters),
            stored_bytes: number(set.stored_bytes),
            concurrent_requests: number(set.concurrent_requests),
            requests_per_minute: number(set.requests_per_minute),
            tokens_per_minute: number(set.tokens_per_minute),
            running_jobs: number(set.running_jobs),
            queued_jobs: number(set.queued_jobs),
            trained_tokens_per_day: number(set.trained_tokens_per_day),
            weight: set.weight,
        }
    }
}

/// Tells null from what is not there.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<i64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Limits to set. What is left out stays; null goes back to the server's default; -1 is no limit.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsPatch {
    /// Adapters.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    adapters: Option<Option<i64>>,
    /// Bytes of adapters, files and jobs.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    stored_bytes: Option<Option<i64>>,
    /// Requests at once.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    concurrent_requests: Option<Option<i64>>,
    /// Requests a minute.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    requests_per_minute: Option<Option<i64>>,
    /// Tokens a minute.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    tokens_per_minute: Option<Option<i64>>,
    /// Training jobs that run at once.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    running_jobs: Option<Option<i64>>,
    /// Training jobs under way.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    queued_jobs: Option<Option<i64>>,
    /// Tokens to train on in a day.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = -1, maximum = 9_007_199_254_740_991_i64)]
    trained_tokens_per_day: Option<Option<i64>>,
    /// Its share of the engine beside the other tenants'.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 1000)]
    weight: Option<Option<i64>>,
}

impl LimitsPatch {
    /// # Errors
    /// 400 that names the limit.
    pub(super) fn into_changes(self) -> Result<LimitChanges, Error> {
        Ok(LimitChanges {
            adapters: bound("adapters", self.adapters)?,
            stored_bytes: bound("stored_bytes", self.stored_bytes)?,
            concurrent_requests: bound("concurrent_requests", self.concurrent_requests)?,
            requests_per_minute: bound("requests_per_minute", self.requests_per_minute)?,
            tokens_per_minute: bound("tokens_per_minute", self.tokens_per_minute)?,
            running_jobs: bound("running_jobs", self.running_jobs)?,
            queued_jobs: bound("queued_jobs", self.queued_jobs)?,
            trained_tokens_per_day: bound("trained_tokens_per_day", self.trained_tokens_per_day)?,
            weight: weight(self.weight)?,
        })
    }
}

fn bound(name: &str, given: Option<Option<i64>>) -> Result<Option<Option<Bound>>, Error> {
    let Some(Some(number)) = given else { return Ok(given.map(|_| None)) };
    let bound = Bound::from_number(number);
    let field = format!("limits.{name}");
    bound.map(|bound| Some(Some(bound))).map_err(|error| Error::invalid(&*field, format!("'{field}' {error}.")))
}

fn weight(given: Option<Option<i64>>) -> Result<Option<Option<u32>>, Error> {
    let Some(Some(number)) = given else { return Ok(given.map(|_| None)) };
    let weight = u32::try_from(number).ok().filter(|weight| (1..=MAX_WEIGHT).contains(weight));
    let words = || Error::invalid("limits.weight", format!("'limits.weight' must be from 1 to {MAX_WEIGHT}."));
    weight.map(|weight| Some(Some(weight))).ok_or_else(words)
}
