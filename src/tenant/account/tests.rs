use super::*;
use crate::tenant::Bound;

const ANN: TenantId = TenantId(7);

fn limited(change: impl FnOnce(&mut Limits)) -> Accounts {
    let accounts = Accounts::default();
    accounts.set_defaults(change);
    accounts
}

fn minute(at: Instant, seconds: u64) -> Instant {
    at + Duration::from_secs(seconds)
}

#[test]
fn places_are_free_again_when_requests_end() {
    let accounts = limited(|limits| limits.concurrent_requests = Some(2));
    let (one, two) = (accounts.of(ANN).enter().unwrap(), accounts.of(ANN).enter().unwrap());
    assert_eq!(accounts.of(ANN).enter().unwrap_err(), LimitError::Concurrent(2));
    assert!(accounts.of(TenantId(8)).enter().is_ok(), "another tenant has places of its own");
    drop(one);
    let charge = two.reserve(1, 1).unwrap();
    let _again = accounts.of(ANN).enter().unwrap();
    assert!(accounts.of(ANN).enter().is_err(), "a charge keeps the place of its request");
    drop(charge);
    assert!(accounts.of(ANN).enter().is_ok());
}

#[test]
fn requests_a_minute_are_counted_when_they_come_in() {
    let accounts = limited(|limits| limits.requests_per_minute = Some(2));
    let (account, start) = (accounts.of(ANN), Instant::now());
    assert!(account.enter_at(start, 0).is_ok() && account.enter_at(start, 0).is_ok());
    let refused = account.enter_at(start, 0).unwrap_err();
    assert_eq!(refused.wait().map(|wait| wait.as_secs()), Some(30), "{refused:?}");
    assert!(account.enter_at(minute(start, 31), 0).is_ok());
    assert!(account.enter_at(minute(start, 31), 0).is_err());
}

#[test]
fn reserved_tokens_are_settled_at_the_end() {
    let accounts = limited(|limits| limits.tokens_per_minute = Some(100));
    let account = accounts.of(ANN);
    let left = || account.rates().tokens.unwrap().remaining;
    let reserve = |prompt, completion| account.enter().unwrap().reserve(prompt, completion);

    let mut charge = reserve(10, 60).unwrap();
    assert_eq!(left(), 30);
    assert!(matches!(reserve(1, 40), Err(LimitError::Tokens { limit: 100, asked: 41, .. })));
    charge.begin();
    charge.spend(5);
    drop(charge);
    assert_eq!(left(), 85, "prompt and five tokens were used");

    drop(reserve(10, 60).unwrap());
    assert_eq!(left(), 85, "what the engine never had costs nothing");

    let mut left_early = reserve(5, 50).unwrap();
    left_early.begin();
    left_early.spend(3);
    left_early.lose(20);
    drop(left_early);
    assert_eq!(left(), 57, "what nobody knows does not come back");

    for (prompt, completion) in [(1, 100), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
        let refused = reserve(prompt, completion).unwrap_err();
        assert!(matches!(refused, LimitError::TooManyTokens { limit: 100, .. }) && refused.wait().is_none());
    }
    assert_eq!(left(), 57);
}

#[test]
fn usage_is_taken_once_and_can_be_put_back() {
    let accounts = Accounts::default();
    let (account, now) = (accounts.of(ANN), Instant::now());
    assert!(accounts.take_usage().is_empty());
    for day in [20_000, 20_000, 20_001] {
        let mut charge = account.enter_at(now, day).unwrap().reserve(4, 8).unwrap();
        charge.begin();
        charge.spend(6);
        charge.settle_at(now, day);
    }
    let taken = accounts.take_usage();
    let usage =
        |requests| Usage { requests, prompt_tokens: 4 * requests, completion_tokens: 6 * requests, trained_tokens: 0 };
    let expected = [(20_000, usage(2)), (20_001, usage(1))];
    assert_eq!(taken, expected.map(|(day, usage)| UsageOfDay { tenant: ANN, day, usage }));
    assert!(accounts.take_usage().is_empty());
    accounts.put_back(taken.clone());
    assert_eq!(accounts.take_usage(), taken);
}

#[test]
fn limits_change_under_running_requests() {
    let accounts = Accounts::default();
    let account = accounts.of(ANN);
    let mut unlimited = account.enter().unwrap().reserve(50, 50).unwrap();
    let set = |requests, tokens| {
        let requests_per_minute = Some(requests);
        let tokens_per_minute = Some(tokens);
        accounts.set_overrides(ANN, Overrides { requests_per_minute, tokens_per_minute, ..Overrides::default() });
    };
    set(Bound::Most(1), Bound::Most(10));
    unlimited.begin();
    drop(unlimited);
    assert_eq!(account.rates().tokens.unwrap().remaining, 10, "what came in before the limit does not count");
    drop(account.enter().unwrap());
    assert!(matches!(account.enter().unwrap_err(), LimitError::Requests { limit: 1, .. }));
    set(Bound::Most(0), Bound::Unlimited);
    assert_eq!(account.enter().unwrap_err(), LimitError::Closed);
    set(Bound::Unlimited, Bound::Unlimited);
    assert!(account.enter().is_ok());
    assert_eq!(account.rates(), Rates::default());
}
