//! The one writer: a task that puts whatever is waiting into one transaction, and answers after the commit.
//!
//! A commit costs far more than a row, so single uploads that arrive together share one; nobody waits for company,
//! since the next group gathers while the last one is written.

use std::{
    sync::{Arc, LazyLock, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use sqlx::{AnyConnection, AssertSqlSafe, Connection as _, Row as _, SqlSafeStr as _, SqlStr};
use tokio::{
    sync::{RwLock, mpsc, oneshot},
    time::Instant,
};

use super::{
    Change, NewAdapter, Observer, Result, StoreError, Stored,
    adapters::{Created, KNOWN_OF_ONE, Known, bind_known},
    ask,
    connect::Connector,
    intern::{self, Interner},
    rows::Dialect,
    totals::Totals,
};
use crate::{
    tenant::{Actor, Deed},
    types::clock::unix_now,
};

/// Jobs that may wait for the writer; more wait in their senders.
const QUEUE: usize = 1024;

/// Rows after which a group is closed, so that nobody waits long for a commit.
const GROUP_ROWS: usize = 4096;

/// Numbers of the change sequence that a job other than an upload may use.
const SEQS_A_JOB: i64 = 4;

/// After a deletion the log is emptied too (SQLite), but not more often than this.
const ERASE_AFTER: Duration = Duration::from_secs(1);

/// After a deletion facts that nobody has are erased, but not more often than this: all generations are read for it.
const SWEEP_AFTER: Duration = Duration::from_secs(600);

/// Uploads' results, in their order.
pub(super) type PutResults = Vec<Result<Stored>>;

/// A writing transaction and what all jobs in it share.
pub(super) struct Tx<'c> {
    pub(super) connection: &'c mut AnyConnection,
    pub(super) interner: &'c mut Interner,
    pub(super) totals: &'c mut Totals,
    pub(super) dialect: Dialect,
    /// Unix seconds, one time for the whole group.
    pub(super) now: i64,
    /// Something was deleted that must not stay in the log either.
    pub(super) erased: bool,
    /// For the observer; None when there is none.
    pub(super) changes: Option<Vec<Change>>,
    /// What the store knows of the only upload in the group, if that was asked when the transaction began.
    pub(super) known: Option<Known>,
    /// The only upload in the group, to be written with the end of the transaction.
    pub(super) created: Option<Created>,
    /// For the audit log, with their numbers.
    pub(super) deeds: Vec<(i64, Deed)>,
    seq: i64,
    seqs_end: i64,
}

impl Tx<'_> {
    /// Notes what the observer is to be told after the commit.
    pub(super) fn changed(&mut self, change: impl FnOnce() -> Change) {
        if let Some(changes) = &mut self.changes {
            changes.push(change());
        }
    }

    /// The next number of the change sequence.
    pub(super) fn next_seq(&mut self) -> i64 {
        self.seq += 1;
        debug_assert!(self.seq <= self.seqs_end, "a job used more numbers than it announced");
        self.seq
    }
}

/// The senders' end.
#[derive(Clone)]
pub(super) struct Writer {
    sender: mpsc::Sender<Message>,
    observer: Arc<OnceLock<Arc<dyn Observer>>>,
    telling: Telling,
}

/// Held from before a commit until the observer was told of it: whoever has read what was committed waits for the rest here ([`Writer::told`]).
type Telling = Arc<RwLock<()>>;

impl Writer {
    /// Starts the task on a connection whose tables are up to date.
    pub(super) fn start(connector: Connector, connection: AnyConnection) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (observer, telling) = (Arc::<OnceLock<_>>::default(), Telling::default());
        let task = Task {
            connector,
            connection: Some(connection),
            interner: Interner::default(),
            totals: Totals::default(),
            last_seq: None,
            erase_at: None,
            sweep_at: None,
            observer: observer.clone(),
            telling: telling.clone(),
        };
        tokio::spawn(task.run(receiver));
        Self { sender, observer, telling }
    }

    /// Returns when the observer knows of all that could be read before the call. Without it a client could see in the store that its adapter is there, and be
    /// told by the memory that it is not.
    pub(super) async fn told(&self) {
        drop(self.telling.read().await);
    }

    pub(super) fn observe(&self, observer: Arc<dyn Observer>) {
        let _ = self.observer.set(observer);
    }

    /// Uploads, in order, all in one transaction, and whose they are for the audit log.
    pub(super) async fn put(&self, items: Vec<NewAdapter>, actor: Option<Arc<Actor>>) -> Result<PutResults> {
        let (sender, receiver) = oneshot::channel();
        let message = Message::Put { items, actor, results: None, sender };
        self.sender.send(message).await.map_err(|_| StoreError::Closed)?;
        receiver.await.map_err(|_| StoreError::Closed)?
    }

    /// Any other write. `work` must have written nothing when it fails with an error that is not fatal.
    pub(super) async fn job<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'t> FnOnce(&'t mut Tx<'_>) -> BoxFuture<'t, Result<T>> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job = TypedJob { work: Some(work), result: None, sender };
        self.sender.send(Message::Job(Box::new(job))).await.map_err(|_| StoreError::Closed)?;
        receiver.await.map_err(|_| StoreError::Closed)?
    }

    /// A write whose loss nobody minds: dropped when the queue is full.
    pub(super) fn try_job<F>(&self, work: F)
    where
        F: for<'t> FnOnce(&'t mut Tx<'_>) -> BoxFuture<'t, Result<()>> + Send + 'static,
    {
        let (sender, _) = oneshot::channel();
        let _ = self.sender.try_send(Message::Job(Box::new(TypedJob { work: Some(work), result: None, sender })));
    }

    /// Ends the task after what is queued.
    pub(super) async fn close(&self) {
        let (sender, receiver) = oneshot::channel();
        if self.sender.send(Message::Close(sender)).await.is_ok() {
            let _ = receiver.await;
        }
    }
}

enum Message {
    Put {
        items: Vec<NewAdapter>,
        actor: Option<Arc<Actor>>,
        results: Option<PutResults>,
        sender: oneshot::Sender<Result<PutResults>>,
    },
    Job(Box<dyn Job>),
    Close(oneshot::Sender<()>),
}

impl Message {
    fn rows(&self) -> usize {
        match self {
            Message::Put { items, .. } => items.len(),
            _ => 1,
        }
    }

    /// Numbers of the change sequence that it uses at most: an upload may also intern facts, and all of a message are at most two entries of the audit log.
    fn seqs(&self) -> i64 {
        match self {
            Message::Put { items, .. } => 2 * items.len() as i64 + 2,
            _ => SEQS_A_JOB,
        }
    }

    /// Tells the sender what happened; `failed` is why the whole group did not.
    fn answer(self, failed: Option<&StoreError>) {
        match self {
            // A sender that is gone has lost interest.
            Message::Put { results, sender, .. } => {
                let _ = sender.send(outcome(results, failed));
            }
            Message::Job(job) => job.answer(failed),
            Message::Close(sender) => {
                let _ = sender.send(());
            }
        }
    }
}

fn outcome<T>(result: Option<T>, failed: Option<&StoreError>) -> Result<T> {
    match failed {
        Some(error) => Err(error.clone()),
        None => result.ok_or(StoreError::Closed),
    }
}

/// A job that is not an upload: its work, then what became of it.
trait Job: Send {
    fn run<'t>(&'t mut self, tx: &'t mut Tx<'_>) -> BoxFuture<'t, Result<()>>;
    fn answer(self: Box<Self>, failed: Option<&StoreError>);
}

struct TypedJob<T, F> {
    work: Option<F>,
    result: Option<Result<T>>,
    sender: oneshot::Sender<Result<T>>,
}

impl<T, F> Job for TypedJob<T, F>
where
    T: Send + 'static,
    F: for<'t> FnOnce(&'t mut Tx<'_>) -> BoxFuture<'t, Result<T>> + Send + 'static,
{
    fn run<'t>(&'t mut self, tx: &'t mut Tx<'_>) -> BoxFuture<'t, Result<()>> {
        Box::pin(async move {
            let Some(work) = self.work.take() else { return Ok(()) };
            match work(tx).await {
                Err(error) if error.is_fatal() => Err(error),
                other => {
                    self.result = Some(other);
                    Ok(())
                }
            }
        })
    }

    fn answer(self: Box<Self>, failed: Option<&StoreError>) {
        let _ = self.sender.send(outcome(self.result, failed).and_then(|result| result));
    }
}

struct Task {
    connector: Connector,
    /// None after it was lost.
    connection: Option<AnyConnection>,
    interner: Interner,
    totals: Totals,
    /// Where the change sequence stood after our last transaction. Anywhere else: another process wrote, and what is remembered may not hold any more.
    last_seq: Option<i64>,
    /// When the log is to be emptied.
    erase_at: Option<Instant>,
    /// When facts that nobody has are to be erased.
    sweep_at: Option<Instant>,
    observer: Arc<OnceLock<Arc<dyn Observer>>>,
    telling: Telling,
}

impl Task {
    async fn run(mut self, mut receiver: mpsc::Receiver<Message>) {
        while let Some(first) = self.next(&mut receiver).await {
            let mut rows = first.rows();
            let mut group = vec![first];
            while rows < GROUP_ROWS
                && !matches!(group.last(), Some(Message::Close(_)))
                && let Ok(message) = receiver.try_recv()
            {
                rows += message.rows();
                group.push(message);
            }
            let outcome = self.write(&mut group).await;
            let closing = matches!(group.last(), Some(Message::Close(_)));
            if closing {
                self.close().await;
            }
            for message in group {
                message.answer(outcome.as_ref().err());
            }
            if closing {
                return;
            }
        }
        self.close().await;
    }

    /// The next message; before it, what is due after deletions.
    async fn next(&mut self, receiver: &mut mpsc::Receiver<Message>) -> Option<Message> {
        while let Some(at) = self.erase_at.into_iter().chain(self.sweep_at).min() {
            if Instant::now() < at {
                if let Ok(message) = tokio::time::timeout_at(at, receiver.recv()).await {
                    return message;
                }
            } else if self.sweep_at == Some(at) {
                self.sweep().await;
            } else {
                self.erase_log().await;
            }
        }
        receiver.recv().await
    }

    /// Writes a group in one transaction.
    async fn write(&mut self, group: &mut [Message]) -> Result<()> {
        let outcome = self.transaction(group).await;
        if let Err(error) = &outcome {
            tracing::error!(%error, "a transaction failed and was rolled back");
            // What it interned is gone with it, and so may be the connection.
            self.interner = Interner::default();
            self.totals = Totals::default();
            if let Some(mut connection) = self.connection.take() {
                // Rolled back at once if it can be told so, else when the database finds it gone.
                let _ = sqlx::query("ROLLBACK").execute(&mut connection).await;
            }
        }
        outcome
    }

    async fn transaction(&mut self, group: &mut [Message]) -> Result<()> {
        let seqs = group.iter().map(Message::seqs).sum();
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => self.connection.insert(self.connector.connect().await?),
        };
        if let Some(faults) = self.connector.faults() {
            faults.before_begin(connection).await?;
        }
        let (dialect, only) = (self.connector.dialect(), only_upload(group).filter(|_| self.connector.is_sqlite()));
        let (seqs_end, known) = match begin(connection, dialect, seqs, only).await {
            // What is known of the upload cannot be read at once with the rest: it is asked again by itself.
            Err(StoreError::Database(error)) if only.is_some() && ask::is_unreadable(&error) => {
                sqlx::query("ROLLBACK").execute(&mut *connection).await?;
                begin(connection, dialect, seqs, None).await?
            }
            begun => begun?,
        };
        if self.last_seq.replace(seqs_end) != Some(seqs_end - seqs) {
            self.interner = Interner::default();
            self.totals = Totals::default();
        }
        let mut tx = Tx {
            connection: &mut *connection,
            interner: &mut self.interner,
            totals: &mut self.totals,
            dialect,
            now: unix_now(),
            erased: false,
            changes: self.observer.get().map(|_| Vec::new()),
            known,
            created: None,
            deeds: Vec::new(),
            seq: seqs_end - seqs,
            seqs_end,
        };
        run_group(&mut tx, group).await?;
        let (erased, changes) = (tx.erased, tx.changes.take());
        let telling = self.telling.write().await;
        if let Some(faults) = self.connector.faults() {
            faults.before_commit().await;
        }
        tx.commit().await?;
        if let (Some(observer), Some(changes)) = (self.observer.get(), changes) {
            changes.into_iter().for_each(|change| observer.committed(change));
        }
        drop(telling);
        if erased {
            self.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_AFTER);
        }
        if erased && self.connector.is_sqlite() {
            self.erase_at.get_or_insert_with(|| Instant::now() + ERASE_AFTER);
        }
        Ok(())
    }

    /// Erases facts that no adapter has any more.
    async fn sweep(&mut self) {
        self.sweep_at = None;
        let Some(connection) = &mut self.connection else { return };
        match intern::sweep(connection, self.connector.dialect()).await {
            Ok(()) => {
                self.interner = Interner::default();
                self.erase_at = self.connector.is_sqlite().then(Instant::now);
            }
            Err(error) => {
                tracing::warn!(%error, "what deleted adapters' numbers meant stays in the database until the next deletion");
                // Whatever it stands at: a new one begins anew.
                self.connection = None;
            }
        }
    }

    /// Moves the log into the database and cuts it, so that deleted contents are nowhere on disk.
    async fn erase_log(&mut self) {
        self.erase_at = None;
        if let Some(connection) = &mut self.connection
            && let Err(error) = sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(connection).await
        {
            tracing::warn!(%error, "deleted adapters stay in the database's log until it is emptied");
            self.erase_at = Some(Instant::now() + ERASE_AFTER);
        }
    }

    async fn close(&mut self) {
        if self.sweep_at.is_some() {
            self.sweep().await;
        }
        if self.erase_at.is_some() {
            self.erase_log().await;
        }
        if let Some(connection) = self.connection.take()
            && let Err(error) = connection.close().await
        {
            tracing::warn!(%error, "closing the database");
        }
    }
}

/// The upload that a group consists of, if it is one that nothing else must be asked about.
fn only_upload(group: &[Message]) -> Option<&NewAdapter> {
    match group {
        [Message::Put { items, .. }] => match &items[..] {
            [item] if !item.is_special() => Some(item),
            _ => None,
        },
        _ => None,
    }
}

/// Begins a writing transaction and takes so many numbers of the change sequence; the last of them, and what is known of `only`. The counter's row is the
/// first that every writer takes, so that numbers rise in the order of commits on PostgreSQL too. What is begun here ends by COMMIT, or by [`Task::write`].
async fn begin(
    connection: &mut AnyConnection,
    dialect: Dialect,
    seqs: i64,
    only: Option<&NewAdapter>,
) -> Result<(i64, Option<Known>)> {
    // SQLite takes all of it as one question: each costs a way to the connection's thread and back, as much as the answer.
    let query = match (dialect, only) {
        (Dialect::Sqlite, Some(item)) => bind_known(sqlx::query(BEGIN_WITH_KNOWN.clone()), item, None).bind(seqs),
        (Dialect::Sqlite, None) => sqlx::query(BEGIN).bind(seqs),
        (Dialect::Postgres, _) => {
            sqlx::query("BEGIN").execute(&mut *connection).await?;
            sqlx::query("UPDATE counter SET value = value + $1 WHERE id = 1 RETURNING value").bind(seqs)
        }
    };
    // All rows: asked for one, sqlx looks no further than the first statement.
    let rows = query.fetch_all(connection).await?;
    let seqs_end = rows.first().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
    let known = only.map(|item| Known::of_one(item, rows.get(1))).transpose()?;
    Ok((seqs_end, known))
}

const BEGIN: &str = "BEGIN IMMEDIATE; UPDATE counter SET value = value + $1 WHERE id = 1 RETURNING value";

/// [`BEGIN`], whose number is the fourth parameter here, and [`KNOWN_OF_ONE`].
static BEGIN_WITH_KNOWN: LazyLock<SqlStr> =
    LazyLock::new(|| AssertSqlSafe(format!("{}; {KNOWN_OF_ONE}", BEGIN.replace("$1", "$4"))).into_sql_str());

/// Runs a group's jobs in order. Uploads next to each other are written together.
async fn run_group(tx: &mut Tx<'_>, group: &mut [Message]) -> Result<()> {
    for run in group.chunk_by_mut(|a, b| matches!((a, b), (Message::Put { .. }, Message::Put { .. }))) {
        if let [Message::Job(job)] = run {
            job.run(tx).await?;
            continue;
        }
        let mut all = Vec::new();
        let mut counts = Vec::with_capacity(run.len());
        for message in run.iter_mut() {
            if let Message::Put { items, .. } = message {
                counts.push(items.len());
                all.append(items);
            }
        }
        let mut written = tx.put_adapters(all).await?.into_iter();
        for (message, count) in run.iter_mut().zip(counts) {
            if let Message::Put { actor, results, .. } = message {
                let own: PutResults = written.by_ref().take(count).collect();
                if let Some(actor) = actor {
                    tx.note(uploaded(actor, &own, "adapter.upload", false));
                    tx.note(uploaded(actor, &own, "adapter.replace", true));
                }
                *results = Some(own);
            }
        }
    }
    Ok(())
}

/// The uploads of a message that made new adapters, or those that replaced some, as one entry of the audit log; None when there was none.
fn uploaded(actor: &Actor, results: &PutResults, action: &'static str, replacing: bool) -> Option<Deed> {
    let mut written = results.iter().filter_map(|result| match result {
        Ok(Stored::New { record, replaced }) if replaced.is_some() == replacing => Some(record),
        _ => None,
    });
    let first = written.next()?;
    let deed = actor.did(action, first.name.clone());
    Some(match written.count() {
        0 => deed,
        more => deed.with(format!("{{\"adapters\":{}}}", more + 1)),
    })
}
