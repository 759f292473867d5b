//! What comes and goes leaves nothing behind, and what stays goes by its age.

use std::path::Path;

use super::*;
use crate::{
    tenant::{Actor, ApiKey, DAY, Limits, Role, Usage, UsageOfDay, Via},
    types::clock::tests::jump,
};

async fn count(store: &Store, table: &'static str) -> i64 {
    let sql = sqlx::AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
    sqlx::Row::get(&sqlx::query(sql).fetch_one(&store.pool).await.unwrap(), 0)
}

/// Bytes of the database and its log.
fn size(directory: &Path) -> u64 {
    std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum()
}

/// An upload whose meaning no other has, as of an imported checkpoint.
fn imported(tenant: TenantId, name: &str, number: u64) -> NewAdapter {
    let mut upload = new(tenant, name, number);
    let frame = Some(number.to_le_bytes().repeat(100));
    upload.contents.facts = Arc::new(Facts { frame, ..facts() });
    upload
}

#[tokio::test]
async fn uploads_that_are_deleted_leave_nothing_behind() {
    for database in Database::each().await {
        let mut sizes = Vec::new();
        for round in 0..8u64 {
            let store = database.open().await;
            let stays = NewAdapter { on_conflict: OnConflict::NewGeneration, ..new(BUILT_IN_TENANT, "stays", 1) };
            written(store.put_adapter(stays).await);
            let name = |i: u64| format!("r{round}-{i}");
            let batch = (0..300).map(|i| imported(BUILT_IN_TENANT, &name(i), round << 32 | i)).collect();
            store.put_adapters(batch).await.unwrap().into_iter().for_each(|result| drop(written(result)));
            let again = NewAdapter { on_conflict: OnConflict::NewGeneration, ..imported(BUILT_IN_TENANT, &name(0), 7) };
            written(store.put_adapter(again).await);
            for i in 0..300 {
                store.delete_adapter(BUILT_IN_TENANT, &name(i)).await.unwrap();
            }
            for table in ["adapters", "generations"] {
                assert_eq!(count(&store, table).await, 1, "{table} after round {round}");
            }
            // What they meant goes now and then, and with the end of the process.
            store.close().await;
            let store = database.open().await;
            assert_eq!(count(&store, "facts").await, 1, "round {round}");
            assert_eq!(all(&store).await.len(), 1);
            store.close().await;
            if let Location::Directory(path) = &database.config.location {
                sizes.push(size(path));
            }
        }
        if let [_, second, .., last] = sizes[..] {
            assert!(last <= second + second / 4, "it grows: {sizes:?}");
        }
    }
}

#[tokio::test]
async fn a_tenant_that_is_deleted_leaves_nothing_behind() {
    for database in Database::each().await {
        let store = database.open().await;
        for round in 0..3 {
            let ann = store.create_tenant("ann").await.unwrap().id;
            store.put_adapters((0..20).map(|i| imported(ann, &format!("a{i}"), i)).collect()).await.unwrap();
            written(store.put_adapter(imported(BUILT_IN_TENANT, &format!("other{round}"), 5)).await);
            store.delete_tenant("ann").await.unwrap();
            // What it used in its last second comes late, together with what others used.
            let usage = Usage { requests: 1, ..Usage::default() };
            let of = |tenant| UsageOfDay { tenant, day: 5, usage };
            store.add_usage(vec![of(ann), of(BUILT_IN_TENANT)]).await.unwrap();
            assert_eq!(count(&store, "tenants").await, 1);
            assert_eq!(count(&store, "tenant_usage").await, 1);
        }
        store.close().await;
        let store = database.open().await;
        assert_eq!(count(&store, "facts").await, 1, "the one that another tenant has");
        assert_eq!(all(&store).await.len(), 3);
        store.close().await;
    }
}

#[tokio::test]
async fn what_another_process_deleted_is_not_remembered() {
    for database in Database::each().await {
        let (server, command) = (database.open().await, database.open().await);
        let ann = server.create_tenant("ann").await.unwrap().id;
        written(server.put_adapter(imported(ann, "a", 1)).await);
        command.delete_tenant("ann").await.unwrap();
        command.close().await;
        // The same meaning again, which the server wrote before and the command erased.
        written(server.put_adapter(imported(BUILT_IN_TENANT, "b", 1)).await);
        assert_eq!(all(&server).await.len(), 1);
        server.close().await;
    }
}

/// A job that failed.
async fn ended_job(store: &Store, number: u32) -> String {
    let id = format!("ftjob-{number:032x}");
    let event = || NewEvent { kind: "status", level: EventLevel::Info, message: "made".into(), data: "{}".into() };
    let job = NewJob {
        id: id.clone(),
        tenant: BUILT_IN_TENANT,
        name: format!("name{number}"),
        name_must_be_free: true,
        status: JobStatus::Queued,
        spec: "{}".into(),
        steps: 10,
        data: vec![(JobData::Training, b"train".to_vec())],
        limits: Limits::default(),
        most: 100,
        key: None,
        event: event(),
    };
    store.create_job(job).await.unwrap();
    let limits = StartLimits { running: 10, running_of_tenant: 10, trained_tokens_per_day: None };
    assert_eq!(store.claim_job(limits, "here", Vec::new(), Turns::default()).await.unwrap().unwrap().id, id);
    let checkpoint = Some(NewCheckpoint { step: 1, state: "{}".into(), metrics: "{}".into(), keep: 3 });
    let samples = vec![("training", "[]".to_owned())];
    let progress = Progress { step: 1, events: vec![event()], samples, checkpoint, ..Progress::default() };
    store.report_progress(&id, 1, progress, None).await.unwrap();
    store.fail_job(&id, 1, "{}".into(), vec![event()]).await.unwrap();
    id
}

async fn dropped(store: &Store, aged: Aged, days: u32) {
    // As if the clock had been like this for long.
    let now = store.now(i64::MAX).await.unwrap();
    while store.drop_aged(aged, days, now).await.unwrap() {}
}

#[tokio::test]
async fn what_is_old_is_dropped_and_nothing_else() {
    for database in Database::each().await {
        let store = database.open().await;
        jump(0);
        let by = store.by(Actor::operator(Via::CommandLine));
        let key = async |revoked: bool| {
            let record = by.create_key(super::keys::key(&ApiKey::generate().unwrap(), "ann")).await.unwrap().unwrap();
            if revoked {
                by.revoke_key(&record.id).await.unwrap();
            }
            record.id
        };
        let today = crate::tenant::today();
        let used = async |day| {
            let usage = Usage { requests: 1, ..Usage::default() };
            store.add_usage(vec![UsageOfDay { tenant: BUILT_IN_TENANT, day, usage }]).await.unwrap();
        };
        // Long ago, by a clock that is then set right; and by one that was years ahead.
        for (number, days) in [(1, -100), (2, 4_000)] {
            jump(days * DAY);
            ended_job(&store, number).await;
            key(true).await;
            used(today + days).await;
        }
        jump(0);
        let (job, used_key) = (ended_job(&store, 3).await, key(false).await);
        used(today).await;
        let entries = store.audit(None, 100).await.unwrap().len();
        for aged in [Aged::Audit, Aged::Jobs, Aged::Keys, Aged::Usage, Aged::Answers] {
            dropped(&store, aged, 5_000).await;
        }
        assert_eq!((count(&store, "jobs").await, count(&store, "keys").await), (3, 3), "all of it is that young");
        assert_eq!(store.audit(None, 100).await.unwrap().len(), entries);
        for aged in [Aged::Audit, Aged::Jobs, Aged::Keys, Aged::Usage, Aged::Answers] {
            dropped(&store, aged, 90).await;
        }
        for table in ["jobs", "job_checkpoints", "job_samples", "keys", "tenant_usage"] {
            assert_eq!(count(&store, table).await, 1, "{table}");
        }
        assert_eq!(count(&store, "job_events").await, 4);
        assert_eq!(store.job(BUILT_IN_TENANT, &job).await.unwrap().status, JobStatus::Failed);
        assert_eq!(store.key(&used_key).await.unwrap().role, Role::Member);
        assert_eq!(store.audit(None, 100).await.unwrap().len(), 1, "what was done today");
        // The newest key stays, however old: a store in which keys were made shows it.
        by.revoke_key(&used_key).await.unwrap();
        jump(4_000 * DAY);
        dropped(&store, Aged::Keys, 1).await;
        assert_eq!(count(&store, "keys").await, 1);
        store.close().await;
    }
}

#[tokio::test]
async fn a_clock_that_is_wrong_for_a_while_makes_nothing_old() {
    for database in Database::each().await {
        let store = database.open().await;
        jump(0);
        store.now(DAY).await.unwrap();
        for number in 1..=2 {
            ended_job(&store, number).await;
        }
        let look = async || {
            let now = store.now(DAY).await.unwrap();
            for aged in [Aged::Audit, Aged::Jobs, Aged::Usage] {
                while store.drop_aged(aged, 5, now).await.unwrap() {}
            }
        };
        // Years ahead, or before everything, for three looks each; the time that follows comes back before the next.
        for days in [4_000, -20_000] {
            for _ in 0..3 {
                jump(days * DAY);
                look().await;
            }
            jump(0);
            for _ in 0..3 {
                look().await;
            }
            assert_eq!(count(&store, "jobs").await, 2, "{days}");
        }
        // When it stays, what is old goes.
        jump(10 * DAY);
        for _ in 0..8 {
            look().await;
        }
        assert_eq!(count(&store, "jobs").await, 0);
        store.close().await;
    }
}

/// Rows of somebody who is not the program, one for each number below a count: what is in them by the number `i`.
async fn many(store: &Store, count: i64, table: &str, values: &str) {
    let sql = format!(
        "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {count} - 1) INSERT INTO {table} SELECT {values} FROM n"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&store.pool).await.unwrap();
}

#[tokio::test]
async fn a_tenant_keeps_its_newest_entries_of_the_audit_log() {
    for database in Database::each().await {
        let store = database.open().await;
        let columns = "audit (id, at, via, tenant, action, target)";
        let values = |first: i64, tenant: &str| format!("{first} + 2 * i, {}, 'http', {tenant}, 'a', 'b'", unix_now());
        // In turns, so that a tenant's oldest are among the others'; more than are counted or dropped at once.
        many(&store, 5_000, columns, &values(1_000, "'ann'")).await;
        many(&store, 300_000, columns, &values(1_001, "'ben'")).await;
        many(&store, 3_000, columns, &values(20_000_000, "NULL")).await;
        let left = async |tenant: &str| -> (i64, i64, i64) {
            let sql = format!("SELECT COUNT(*), MIN(id), MAX(id) FROM audit WHERE tenant {tenant}");
            let row = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_one(&store.pool).await.unwrap();
            (sqlx::Row::get(&row, 0), sqlx::Row::get(&row, 1), sqlx::Row::get(&row, 2))
        };
        let shorten = async |most: u32| {
            let mut pieces = 0;
            for mut excess in store.excess(most).await.unwrap() {
                pieces += 1;
                while store.drop_excess(&mut excess).await.unwrap() {
                    pieces += 1;
                }
            }
            pieces
        };
        let newest_of_ben = 1_001 + 2 * 299_999;
        assert_eq!(shorten(300_000).await, 0, "nobody has more");
        assert_eq!(shorten(297_500).await, 3, "a thousand at once");
        assert_eq!(left("= 'ben'").await, (297_500, newest_of_ben - 2 * 297_499, newest_of_ben));
        assert_eq!(left("= 'ann'").await, (5_000, 1_000, 10_998), "another's stay");
        assert!(shorten(2_999).await > 290);
        assert_eq!(left("= 'ben'").await.0, 2_999);
        assert_eq!(left("= 'ann'").await, (2_999, 10_998 - 2 * 2_998, 10_998));
        assert_eq!(left("IS NULL").await.0, 3_000, "the operator's own");
        assert_eq!(shorten(2_999).await, 0);
        store.close().await;
    }
}

#[tokio::test]
async fn a_tenant_keeps_its_newest_ended_jobs() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        let most = totals::MOST_ENDED;
        let columns = "jobs (id, tenant, name, status, steps, created_at, finished_at, change_seq, spec)";
        let now = unix_now();
        let values = |tenant: TenantId, id: &str| {
            format!("'ftjob-{id}' || (1000000 + i), {}, 'old', 'cancelled', 1, {now}, {now}, 1, '{{}}'", tenant.0)
        };
        many(&store, most + 5, columns, &values(ann, "1")).await;
        many(&store, 20, columns, &values(BUILT_IN_TENANT, "2")).await;
        let events = "job_events (job, seq, kind, level, message, data, created_at)";
        many(&store, most + 5, events, &format!("'ftjob-1' || (1000000 + i), 1, 'a', 'info', '', '{{}}', {now}")).await;
        let end = async |tenant, id: &str| {
            let event = NewEvent { kind: "a", level: EventLevel::Info, message: String::new(), data: "{}".into() };
            let job = NewJob {
                id: format!("ftjob-{id}"),
                tenant,
                name: "new".into(),
                name_must_be_free: true,
                status: JobStatus::Queued,
                spec: "{}".into(),
                steps: 1,
                data: vec![],
                limits: Limits::default(),
                most: 10,
                key: None,
                event,
            };
            store.create_job(job).await.unwrap();
            assert_eq!(store.cancel_job(tenant, &format!("ftjob-{id}")).await.unwrap().status, JobStatus::Cancelled);
        };
        let kept = async || count(&store, "jobs").await - 20;
        // A few at once, until there are no more than there may be.
        end(ann, "9000001").await;
        assert_eq!(kept().await, most + 2);
        end(ann, "9000002").await;
        assert_eq!(kept().await, most);
        end(ann, "9000003").await;
        assert_eq!(kept().await, most);
        assert_eq!(
            count(&store, "job_events").await,
            most + 3,
            "with what they left behind; the new ones have two each"
        );
        let (newest, oldest) = (store.jobs(ann, None, 1).await.unwrap(), store.job(ann, "ftjob-11000007").await);
        assert!(matches!(oldest, Err(StoreError::JobNotFound)));
        assert_eq!(newest[0].id, "ftjob-9000003");
        assert!(store.job(ann, "ftjob-11000008").await.is_ok());
        // One that was made before all the others is there when it ends.
        end(ann, "0000001").await;
        assert!(store.job(ann, "ftjob-0000001").await.is_ok());
        end(BUILT_IN_TENANT, "9000009").await;
        assert_eq!(kept().await, most + 1, "nobody else's go");
        store.close().await;
    }
}

#[tokio::test]
async fn a_tenant_keeps_its_newest_answers() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        let most = totals::MOST_ANSWERS;
        let columns = "idempotency (tenant, route, key, request_hash, response, created_at)";
        let hash = match &database.config.location {
            Location::Directory(_) => "x'00'",
            Location::Postgres(_) => "'\\x00'::bytea",
        };
        let now = unix_now();
        for (tenant, count) in [(ann, most + totals::ANSWERS_AT_ONCE), (BUILT_IN_TENANT, 50)] {
            let values = format!("{}, 'r', 'k' || (1000000 + i), {hash}, '', {now} - 20000 + i", tenant.0);
            many(&store, count, columns, &values).await;
        }
        let keep = async |tenant, key: &str| {
            let respond = Arc::new(|_: &AdapterRecord| "kept".to_owned());
            let idempotency = Idempotency { route: "r", key: key.into(), request_hash: [1; 32], respond };
            written(store.put_adapter(NewAdapter { idempotency: Some(idempotency), ..new(tenant, key, 1) }).await);
        };
        keep(ann, "new1").await;
        assert_eq!(count(&store, "idempotency").await, most + 50);
        keep(ann, "new2").await;
        keep(BUILT_IN_TENANT, "new").await;
        assert_eq!(count(&store, "idempotency").await, most + 1 + 51, "the next go a thousand later");
        let kept = async |key: &str, hash| store.kept_answer(ann, "r", key, &hash).await;
        assert_eq!(kept("new1", [1; 32]).await.unwrap().as_deref(), Some("kept"));
        assert_eq!(kept("k1001000", [1; 32]).await.unwrap(), None, "the oldest went");
        assert!(kept("k1001001", [1; 32]).await.is_err(), "this one is there, of another request");
        store.close().await;
    }
}
