use sqlx::Row as _;

use super::*;
use crate::{
    store::training::MOST_PAUSES,
    tenant::{Actor, Limits, Via},
};

fn job_id(number: u32) -> String {
    format!("ftjob-{number:032x}")
}

fn event(kind: &'static str) -> NewEvent {
    NewEvent { kind, level: EventLevel::Info, message: format!("{kind} happened"), data: "{}".into() }
}

fn job(number: u32, tenant: TenantId, name: &str) -> NewJob {
    NewJob {
        id: job_id(number),
        tenant,
        name: name.into(),
        name_must_be_free: true,
        status: JobStatus::Queued,
        spec: r#"{"method":"grpo"}"#.into(),
        steps: 10,
        data: vec![(JobData::Training, b"train".to_vec()), (JobData::Validation, b"held out".to_vec())],
        limits: Limits { queued_jobs: Some(3), ..Limits::default() },
        most: 5,
        key: None,
        event: event("made"),
    }
}

async fn made(store: &Store, new: NewJob) -> JobRecord {
    match store.create_job(new).await.unwrap() {
        JobStored::New(job) => job,
        JobStored::Before(job) => panic!("{} was there", job.id),
    }
}

const FREE: StartLimits = StartLimits { running: 10, running_of_tenant: 10, trained_tokens_per_day: None };

async fn claimed(store: &Store) -> JobRecord {
    store.claim_job(FREE, "here", Vec::new(), Turns::default()).await.unwrap().unwrap()
}

fn step(number: u64, checkpoint: bool) -> Progress {
    let checkpoint = checkpoint.then(|| NewCheckpoint {
        step: number,
        state: format!("state {number}"),
        metrics: "{}".into(),
        keep: 2,
    });
    Progress {
        step: number,
        metrics: Some(format!("{{\"step\":{number}}}")),
        events: vec![event("step")],
        samples: vec![("training", "[]".into())],
        checkpoint,
        trained_tokens: 0,
    }
}

#[tokio::test]
async fn a_job_is_made_run_and_published_in_one_piece_each() {
    for database in Database::each().await {
        let store = database.open().await;
        let tenant = store.create_tenant("alice").await.unwrap().id;
        let queued = made(&store, job(1, tenant, "a")).await;
        assert_eq!((queued.status, queued.events, &*queued.owner), (JobStatus::Queued, 1, "alice"));
        let running = claimed(&store).await;
        assert_eq!((running.status, running.attempt, running.started_at.is_some()), (JobStatus::Running, 1, true));
        assert!(store.claim_job(FREE, "here", Vec::new(), Turns::default()).await.unwrap().is_none());
        assert_eq!(store.job_data(&queued.id, JobData::Validation).await.unwrap().unwrap(), b"held out");
        for number in 1..=5 {
            store.report_progress(&queued.id, 1, step(number, number % 2 == 1), None).await.unwrap();
        }
        let now = store.job(tenant, &queued.id).await.unwrap();
        assert_eq!((now.step, now.events, now.metrics.as_deref()), (5, 7, Some("{\"step\":5}")));
        let kept: Vec<u64> = store.checkpoints(&queued.id).await.unwrap().0.iter().map(|it| it.step).collect();
        assert_eq!(kept, [5, 3], "the two newest");

        let publication = Publication {
            adapter: new(tenant, "a", 7),
            result: r#"{"adapter":"a"}"#.into(),
            events: vec![event("result"), event("status")],
        };
        // Another's upload does not get the name before the job has ended.
        assert!(matches!(store.put_adapter(new(tenant, "a", 1)).await, Err(StoreError::NameReserved)));
        assert!(matches!(store.publish_job(&queued.id, 2, publication.clone()).await, Err(StoreError::JobLost)));
        assert!(store.own_adapter(tenant, "a").await.unwrap().is_none());
        let done = store.publish_job(&queued.id, 1, publication).await.unwrap();
        assert_eq!((done.status, done.finished_at.is_some()), (JobStatus::Succeeded, true));
        assert_eq!(store.own_adapter(tenant, "a").await.unwrap().unwrap().contents, contents(7));
        assert!(store.job_data(&queued.id, JobData::Training).await.unwrap().is_none(), "the data went with the end");
        let seen = store.events_after(&queued.id, 0, 100).await.unwrap();
        let numbers: Vec<u64> = seen.iter().map(|event| event.seq).collect();
        assert_eq!(numbers, (1..=9).collect::<Vec<_>>());
        let last = store.events_before(&queued.id, u64::MAX, 2).await.unwrap();
        assert_eq!(last.iter().map(|event| event.seq).collect::<Vec<_>>(), [9, 8]);
        assert!(matches!(store.report_progress(&queued.id, 1, step(6, true), None).await, Err(StoreError::JobLost)));
        assert_eq!(store.samples(&queued.id, Some(4), 10).await.unwrap().len(), 3);
        store.close().await;
    }
}

/// Action and target of every entry of the audit log, oldest first.
async fn deeds(store: &Store) -> Vec<(String, String)> {
    let entries = store.audit(None, 1000).await.unwrap();
    entries.into_iter().rev().map(|entry| (entry.action, entry.target)).collect()
}

#[tokio::test]
async fn pauses_have_an_end_and_what_changes_nothing_leaves_no_trace() {
    for database in Database::each().await {
        let store = database.open().await;
        made(&store, job(1, BUILT_IN_TENANT, "a")).await;
        let (by, id) = (store.by(Actor { admin: false, ..Actor::operator(Via::Http) }), job_id(1));
        by.resume_job(BUILT_IN_TENANT, &id).await.unwrap();
        for _ in 0..MOST_PAUSES {
            for _ in 0..2 {
                by.pause_job(BUILT_IN_TENANT, &id).await.unwrap();
            }
            for _ in 0..2 {
                by.resume_job(BUILT_IN_TENANT, &id).await.unwrap();
            }
        }
        let refused = by.pause_job(BUILT_IN_TENANT, &id).await;
        assert!(matches!(refused, Err(StoreError::PausedEnough(most)) if most == MOST_PAUSES as u64), "{refused:?}");
        let now = store.job(BUILT_IN_TENANT, &id).await.unwrap();
        assert_eq!((now.status, now.events), (JobStatus::Queued, 1 + 2 * MOST_PAUSES as u64));
        for _ in 0..2 {
            by.cancel_job(BUILT_IN_TENANT, &id).await.unwrap();
        }
        let told = deeds(&store).await;
        assert_eq!(told.len() as i64, 2 * MOST_PAUSES + 1);
        let kinds = [&told[0], &told[1], told.last().unwrap()].map(|(action, target)| (&**action, &**target));
        assert_eq!(kinds, ["job.pause", "job.resume", "job.cancel"].map(|action| (action, &*id)));
        store.close().await;
    }
}

#[tokio::test]
async fn what_a_job_publishes_is_in_the_log_and_what_is_public_is_an_admin_s() {
    for database in Database::each().await {
        let store = database.open().await;
        let tenant = store.create_tenant("alice").await.unwrap().id;
        written(store.put_adapter(NewAdapter { public: Some(true), ..new(tenant, "a", 1) }).await);
        let replacing = || NewJob { name_must_be_free: false, ..job(1, tenant, "a") };
        let admin = Actor { tenant: Some("alice".into()), ..Actor::operator(Via::Http) };
        let member = store.by(Actor { admin: false, ..admin.clone() });
        assert!(matches!(member.create_job(replacing()).await, Err(StoreError::PublicAdapter)));
        made(&store.by(admin), replacing()).await;
        claimed(&store).await;
        let adapter = NewAdapter { on_conflict: OnConflict::NewGeneration, ..new(tenant, "a", 7) };
        let publication = Publication { adapter, result: "{}".into(), events: vec![event("result")] };
        store.publish_job(&job_id(1), 1, publication).await.unwrap();
        let entries = store.audit(None, 10).await.unwrap();
        let actions: Vec<&str> = entries.iter().map(|entry| &*entry.action).collect();
        assert_eq!(actions, ["adapter.publish", "job.create"]);
        let told = (&*entries[0].via, entries[0].tenant.as_deref(), &*entries[0].target, entries[0].detail.clone());
        assert_eq!(told, ("training", Some("alice"), "a", Some(format!("{{\"job\":\"{}\"}}", job_id(1)))));
        store.close().await;
    }
}

#[tokio::test]
async fn a_publication_that_fails_writes_nothing() {
    for database in Database::each().await {
        let store = database.open().await;
        let tenant = store.create_tenant("alice").await.unwrap().id;
        written(store.put_adapter(new(tenant, "a", 1)).await);
        assert!(matches!(store.create_job(job(1, tenant, "a")).await, Err(StoreError::NameTaken)));
        // The owner may replace an adapter under a job that will add a generation to it; the job then finds what is there.
        let replacing = NewJob { name_must_be_free: false, ..job(1, tenant, "a") };
        made(&store, replacing).await;
        claimed(&store).await;
        let adapter = new(tenant, "a", 7);
        let publication = Publication { adapter, result: "{}".into(), events: vec![event("result")] };
        let before = store.job(tenant, &job_id(1)).await.unwrap();
        assert!(matches!(store.publish_job(&job_id(1), 1, publication).await, Err(StoreError::NameTaken)));
        assert_eq!(store.job(tenant, &job_id(1)).await.unwrap(), before);
        assert_eq!(store.own_adapter(tenant, "a").await.unwrap().unwrap().contents, contents(1));
        store.close().await;
    }
}

#[tokio::test]
async fn a_step_is_reported_once_whoever_computes_it_again() {
    for database in Database::each().await {
        let store = database.open().await;
        made(&store, job(1, BUILT_IN_TENANT, "a")).await;
        claimed(&store).await;
        for number in 1..=3 {
            store.report_progress(&job_id(1), 1, step(number, number == 2), None).await.unwrap();
        }
        // The process dies; the next one goes on from step 2.
        assert_eq!(store.requeue_jobs().await.unwrap(), 1);
        assert_eq!(claimed(&store).await.attempt, 2);
        assert!(matches!(store.report_progress(&job_id(1), 1, step(4, false), None).await, Err(StoreError::JobLost)));
        let before = store.job(BUILT_IN_TENANT, &job_id(1)).await.unwrap().events;
        store.report_progress(&job_id(1), 2, step(3, true), None).await.unwrap();
        let again = store.job(BUILT_IN_TENANT, &job_id(1)).await.unwrap();
        assert_eq!((again.events, again.step), (before, 3));
        assert_eq!(store.checkpoints(&job_id(1)).await.unwrap().0[0].step, 3, "its checkpoint is taken all the same");
        store.report_progress(&job_id(1), 2, step(4, false), None).await.unwrap();
        let events = store.events_after(&job_id(1), 0, 100).await.unwrap();
        assert_eq!(events.iter().filter(|event| event.kind == "step").count(), 4);
        store.close().await;
    }
}

#[tokio::test]
async fn owners_stop_jobs_whatever_their_worker_does() {
    for database in Database::each().await {
        let store = database.open().await;
        let tenant = store.create_tenant("alice").await.unwrap().id;
        for number in 1..=3 {
            made(&store, job(number, tenant, &format!("a{number}"))).await;
        }
        let first = claimed(&store).await;
        assert_eq!(first.id, job_id(1), "the oldest");
        assert_eq!(store.pause_job(tenant, &first.id).await.unwrap().status, JobStatus::Paused);
        assert_eq!(store.pause_job(tenant, &first.id).await.unwrap().status, JobStatus::Paused);
        assert!(matches!(store.report_progress(&first.id, 1, step(1, true), None).await, Err(StoreError::JobLost)));
        let kept = step(1, true).checkpoint.unwrap();
        store.leave_checkpoint(&first.id, 1, kept.clone()).await.unwrap();
        assert_eq!(store.checkpoints(&first.id).await.unwrap().0.len(), 1);
        assert_eq!(store.resume_job(tenant, &first.id).await.unwrap().status, JobStatus::Queued);
        assert_eq!(claimed(&store).await.id, first.id, "who ran before goes first");
        assert_eq!(store.cancel_job(tenant, &first.id).await.unwrap().status, JobStatus::Cancelled);
        assert_eq!(store.cancel_job(tenant, &first.id).await.unwrap().status, JobStatus::Cancelled);
        assert!(matches!(store.leave_checkpoint(&first.id, 2, kept).await, Err(StoreError::JobLost)));
        assert!(matches!(store.resume_job(tenant, &first.id).await, Err(StoreError::JobStatus(JobStatus::Cancelled))));
        assert!(matches!(store.pause_job(tenant, &first.id).await, Err(StoreError::JobStatus(JobStatus::Cancelled))));
        assert!(
            matches!(store.cancel_job(BUILT_IN_TENANT, &job_id(2)).await, Err(StoreError::JobNotFound)),
            "not theirs"
        );

        let failing = claimed(&store).await;
        let failed = store.fail_job(&failing.id, failing.attempt, "{\"code\":\"x\"}".into(), vec![]).await.unwrap();
        assert_eq!((failed.status, failed.error.as_deref()), (JobStatus::Failed, Some("{\"code\":\"x\"}")));
        assert!(matches!(store.cancel_job(tenant, &failing.id).await, Err(StoreError::JobStatus(JobStatus::Failed))));
        // The names are free again.
        written(store.put_adapter(new(tenant, "a1", 1)).await);
        let ids: Vec<String> = store.jobs(tenant, None, 10).await.unwrap().into_iter().map(|job| job.id).collect();
        assert_eq!(ids, [job_id(3), job_id(2), job_id(1)]);
        assert_eq!(store.jobs(tenant, Some(&job_id(2)), 10).await.unwrap().len(), 1);
        store.close().await;
    }
}

#[tokio::test]
async fn places_are_shared_out_by_tenant_and_limited() {
    for database in Database::each().await {
        let store = database.open().await;
        let (alice, bob) = (store.create_tenant("a").await.unwrap().id, store.create_tenant("b").await.unwrap().id);
        for number in 1..=3 {
            made(&store, job(number, alice, &format!("x{number}"))).await;
        }
        assert!(matches!(store.create_job(job(9, alice, "x9")).await, Err(StoreError::TooManyJobs(3))));
        assert!(matches!(store.create_job(job(9, bob, "x3")).await, Ok(JobStored::New(_))), "names are a tenant's own");
        made(&store, job(10, bob, "y")).await;
        assert!(matches!(store.create_job(job(11, BUILT_IN_TENANT, "z")).await, Err(StoreError::JobsFull)));
        let many = NewJob { limits: Limits::default(), most: 9, ..job(12, alice, "x1") };
        assert!(matches!(store.create_job(many).await, Err(StoreError::NameReserved)));

        let limits = StartLimits { running: 3, running_of_tenant: 2, trained_tokens_per_day: None };
        let next = |busy: Vec<String>| store.claim_job(limits, "here", busy, Turns::default());
        assert_eq!(next(vec![]).await.unwrap().unwrap().id, job_id(1));
        assert_eq!(next(vec![]).await.unwrap().unwrap().id, job_id(9), "whose tenant has fewer");
        assert_eq!(next(vec![job_id(2)]).await.unwrap().unwrap().id, job_id(3), "a busy one is left out");
        assert!(next(vec![]).await.unwrap().is_none(), "three run");
        store.cancel_job(bob, &job_id(9)).await.unwrap();
        assert_eq!(next(vec![]).await.unwrap().unwrap().id, job_id(10), "alice has her two");
        store.close().await;
    }
}

/// A start, a claim and a step look at jobs under way only, however many have ended.
#[tokio::test]
async fn jobs_that_ended_are_not_read_to_find_the_next() {
    let database = Database::sqlite();
    let store = database.open().await;
    for sql in [super::super::training::RUNNING, super::super::training::QUEUED] {
        let explain = format!("EXPLAIN QUERY PLAN {}", sql.replace("$1", "1"));
        let plan = store.rows(sqlx::query(sqlx::AssertSqlSafe(explain))).await.unwrap();
        let steps: Vec<String> = plan.iter().map(|row| row.try_get::<String, _>(3).unwrap()).collect();
        let jobs = steps.iter().find(|step| step.contains("jobs") || step.contains(" j ")).unwrap();
        assert!(jobs.starts_with("SEARCH") && jobs.contains("jobs_active"), "{steps:?}");
    }
    store.close().await;
}

#[tokio::test]
async fn tenants_take_turns_with_their_jobs() {
    for database in Database::each().await {
        let store = database.open().await;
        let (alice, bob) = (store.create_tenant("a").await.unwrap().id, store.create_tenant("b").await.unwrap().id);
        for number in 1..=2 {
            made(&store, job(number, alice, &format!("a{number}"))).await;
        }
        let one = StartLimits { running: 1, ..FREE };
        let claim = async |turns: &[(TenantId, u64)]| {
            let turns = turns.iter().copied().collect();
            store.claim_job(one, "here", vec![], turns).await.unwrap().unwrap()
        };
        let waits = async |tenant, turns: &[(TenantId, u64)]| {
            store.another_waits(one, tenant, &[], &turns.iter().copied().collect()).await.unwrap()
        };
        assert_eq!(claim(&[]).await.id, job_id(1));
        assert!(!waits(alice, &[(alice, 1)]).await, "her own second job is no other's");
        made(&store, job(3, bob, "b")).await;
        assert!(waits(alice, &[(alice, 1)]).await);
        let (two, nobody) = (StartLimits { running: 2, ..FREE }, Turns::default());
        assert!(!store.another_waits(two, alice, &[], &nobody).await.unwrap(), "there is a place for him");
        store.defer_job(&job_id(1), 1, "his turn").await.unwrap();
        assert_eq!(claim(&[(alice, 1)]).await.id, job_id(3), "though hers came first, and began");
        assert!(waits(bob, &[(alice, 1), (bob, 2)]).await);
        store.defer_job(&job_id(3), 1, "her turn").await.unwrap();
        assert_eq!(claim(&[(alice, 1), (bob, 2)]).await.id, job_id(1), "the one that had begun");
        store.close().await;
    }
}

#[tokio::test]
async fn the_same_key_is_the_same_job() {
    for database in Database::each().await {
        let store = database.open().await;
        let keyed = |number, hash| {
            let key = JobKey { route: "POST /x", key: "k".into(), request_hash: [hash; 32] };
            NewJob { key: Some(key), ..job(number, BUILT_IN_TENANT, "a") }
        };
        let first = made(&store, keyed(1, 1)).await;
        assert_eq!(store.create_job(keyed(2, 1)).await.unwrap(), JobStored::Before(first));
        assert!(matches!(store.create_job(keyed(3, 2)).await, Err(StoreError::IdempotencyMismatch)));
        store.close().await;
    }
}

#[tokio::test]
async fn validation_in_the_background_ends_in_the_queue_or_in_failure() {
    for database in Database::each().await {
        let store = database.open().await;
        for number in 1..=3 {
            let new = NewJob { status: JobStatus::Validating, ..job(number, BUILT_IN_TENANT, &format!("a{number}")) };
            made(&store, new).await;
        }
        let waiting = store.unfinished_jobs().await.unwrap();
        assert!(waiting.len() == 3 && waiting.iter().all(|job| job.status == JobStatus::Validating));
        assert!(store.claim_job(FREE, "here", vec![], Turns::default()).await.unwrap().is_none());
        let good = store.end_validation(&job_id(1), Ok(77)).await.unwrap();
        assert_eq!((good.status, good.steps), (JobStatus::Queued, 77));
        let bad = store.end_validation(&job_id(2), Err(("{}".into(), vec![]))).await.unwrap();
        assert_eq!(bad.status, JobStatus::Failed);
        store.cancel_job(BUILT_IN_TENANT, &job_id(3)).await.unwrap();
        assert_eq!(store.end_validation(&job_id(3), Ok(5)).await.unwrap().status, JobStatus::Cancelled);
        store.close().await;
    }
}

#[tokio::test]
async fn files_are_kept_within_bounds_and_go_with_their_tenant() {
    for database in Database::each().await {
        let store = database.open().await;
        let tenant = store.create_tenant("alice").await.unwrap().id;
        let file = |number: u32, size: usize| NewFile {
            id: format!("file-{number:032x}"),
            tenant,
            filename: "train.jsonl".into(),
            purpose: "fine-tune".into(),
            data: vec![b'x'; size],
            most_of_tenant: 100,
            room: Room::default(),
            key: None,
        };
        let first = store.put_file(file(1, 60)).await.unwrap();
        assert_eq!((first.bytes, &*first.filename), (60, "train.jsonl"));
        assert!(matches!(store.put_file(file(2, 41)).await, Err(StoreError::FilesFull)));
        let second = store.put_file(file(2, 40)).await.unwrap();
        assert_eq!(store.files(tenant, None, 10).await.unwrap(), [second.clone(), first.clone()]);
        assert_eq!(store.files(tenant, Some(&second.id), 10).await.unwrap(), std::slice::from_ref(&first));
        assert_eq!(store.file_data(tenant, &first.id).await.unwrap().len(), 60);
        assert!(matches!(store.file_data(BUILT_IN_TENANT, &first.id).await, Err(StoreError::FileNotFound)));
        assert!(matches!(store.delete_file(BUILT_IN_TENANT, &first.id).await, Err(StoreError::FileNotFound)));
        store.delete_file(tenant, &first.id).await.unwrap();
        assert!(matches!(store.file(tenant, &first.id).await, Err(StoreError::FileNotFound)));
        store.put_file(file(3, 60)).await.unwrap();

        made(&store, job(1, tenant, "a")).await;
        claimed(&store).await;
        store.report_progress(&job_id(1), 1, step(1, true), None).await.unwrap();
        store.delete_tenant("alice").await.unwrap();
        assert!(matches!(store.report_progress(&job_id(1), 1, step(2, true), None).await, Err(StoreError::JobLost)));
        assert!(matches!(store.job_status(&job_id(1)).await, Err(StoreError::JobNotFound)));
        assert!(store.events_after(&job_id(1), 0, 10).await.unwrap().is_empty());
        assert!(store.checkpoints(&job_id(1)).await.unwrap().0.is_empty());
        assert!(store.files(tenant, None, 10).await.unwrap().is_empty());
        store.close().await;
    }
}
