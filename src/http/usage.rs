//! What a tenant used, day by day: for itself and for admins.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use time::{Date, Month};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::{Admin, Auth},
    error::{AdminErrors, ApiResult, CommonErrors, ErrorBody},
    extract::{ApiPath, ApiQuery},
    state::AppState,
};
use crate::{
    service::{DayOfUsage, Error},
    tenant::{self, Usage},
    types::TenantId,
};

/// Most days of an answer.
const MOST_DAYS: i64 = 1000;
/// Days of an answer when none are asked for.
const DEFAULT_DAYS: i64 = 30;
/// The Julian day of 1970-01-01.
const EPOCH: i32 = 2_440_588;

/// What was used.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsageCounts {
    /// Requests to metered routes that were let in.
    requests: u64,
    /// Each prompt once, whatever the number of choices.
    prompt_tokens: u64,
    /// Of all choices, those of streams that were cut included.
    completion_tokens: u64,
    /// Tokens of completions and demonstrations in training jobs.
    trained_tokens: u64,
}

impl From<Usage> for UsageCounts {
    fn from(usage: Usage) -> Self {
        let Usage { requests, prompt_tokens, completion_tokens, trained_tokens } = usage;
        Self { requests, prompt_tokens, completion_tokens, trained_tokens }
    }
}

/// A day.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsageDay {
    /// `usage.day`
    object: &'static str,
    /// In UTC.
    #[schema(example = "2026-11-25")]
    day: String,
    /// What was used on it.
    #[serde(flatten)]
    counts: UsageCounts,
}

/// Days with their sum.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsageList {
    /// `list`
    object: &'static str,
    /// The tenant's name.
    tenant: String,
    /// Oldest first; days without use are left out.
    data: Vec<UsageDay>,
    /// Of all these days.
    total: UsageCounts,
}

/// Which days.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UsageDays {
    /// The first day, UTC; by default 29 days before the last.
    #[param(example = "2026-11-01")]
    from: Option<String>,
    /// The last day, UTC; by default today.
    #[param(example = "2026-11-30")]
    to: Option<String>,
}

impl UsageDays {
    fn read(&self) -> Result<(i64, i64), Error> {
        let to = self.to.as_deref().map_or(Ok(tenant::today()), |text| day("to", text))?;
        let from = self.from.as_deref().map_or(Ok(to - DEFAULT_DAYS + 1), |text| day("from", text))?;
        if from > to || to - from >= MOST_DAYS {
            let message = format!("'from' must be a day up to 'to', and at most {MOST_DAYS} days before its end.");
            return Err(Error::invalid("from", message));
        }
        Ok((from, to))
    }
}

/// A date as days since 1970.
fn day(param: &str, text: &str) -> Result<i64, Error> {
    let read = || {
        let mut parts = text.split('-');
        let (year, month, date) = (parts.next()?, parts.next()?, parts.next()?);
        let fits = parts.next().is_none() && [year.len(), month.len(), date.len()] == [4, 2, 2];
        let month = Month::try_from(month.parse::<u8>().ok()?).ok()?;
        let date = Date::from_calendar_date(year.parse().ok()?, month, date.parse().ok()?).ok()?;
        fits.then(|| i64::from(date.to_julian_day() - EPOCH))
    };
    read().ok_or_else(|| Error::invalid(param, format!("'{param}' must be a day such as 2026-11-25.")))
}

fn date(day: i64) -> String {
    let julian = i32::try_from(day).ok().and_then(|day| day.checked_add(EPOCH));
    julian
        .and_then(|julian| Date::from_julian_day(julian).ok())
        .map_or_else(|| day.to_string(), |date| date.to_string())
}

async fn answer(state: &AppState, id: TenantId, tenant: String, days: &UsageDays) -> ApiResult<Json<UsageList>> {
    let (from, to) = days.read()?;
    let days = state.service.usage(id, from, to).await?;
    let mut total = Usage::default();
    days.iter().for_each(|day| total.add(&day.usage));
    let shown = |of: DayOfUsage| UsageDay { object: "usage.day", day: date(of.day), counts: of.usage.into() };
    Ok(Json(UsageList { object: "list", tenant, data: days.into_iter().map(shown).collect(), total: total.into() }))
}

/// Show what the caller used
#[utoipa::path(
    get, path = "/usage", tag = "usage", params(UsageDays),
    responses((status = 200, description = "The caller's tenant, by day.", body = UsageList), (status = 400, description = "A query parameter is no day, or out of range.", body = ErrorBody), CommonErrors),
)]
pub(super) async fn own_usage(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiQuery(days): ApiQuery<UsageDays>,
) -> ApiResult<Json<UsageList>> {
    answer(&state, caller.tenant, caller.tenant_name.to_string(), &days).await
}

/// Show what a tenant used
#[utoipa::path(
    get, path = "/admin/tenants/{name}/usage", tag = "admin", params(("name" = String, Path, description = "The tenant."), UsageDays),
    responses(
        (status = 200, description = "By day.", body = UsageList),
        (status = 400, description = "A query parameter is no day, or out of range.", body = ErrorBody),
        (status = 404, description = "There is no such tenant.", body = ErrorBody),
        CommonErrors, AdminErrors,
    ),
)]
pub(super) async fn tenant_usage(
    State(state): State<AppState>,
    _admin: Admin,
    ApiPath(name): ApiPath<String>,
    ApiQuery(days): ApiQuery<UsageDays>,
) -> ApiResult<Json<UsageList>> {
    let tenant = state.service.tenant(&name).await?;
    answer(&state, tenant.id, tenant.name, &days).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_read_as_they_are_written() {
        for (text, number) in [("1970-01-01", 0), ("2000-02-29", 11_016), ("2026-11-25", 20_782)] {
            assert_eq!(day("from", text).unwrap(), number);
            assert_eq!(date(number), text);
        }
        for text in
            ["", "2026-11", "2026-02-30", "2026-13-01", "26-11-25", "2026-11-25-1", "+026-11-25x", "２０２６-11-25"]
        {
            assert_eq!(day("from", text).unwrap_err().param.as_deref(), Some("from"), "{text}");
        }
    }
}
