//! Asking SQLite in spite of text that is no UTF-8.
//!
//! sqlx reads a row as a whole, so that one such text fails the question, and with it everybody's rows. That question is then asked again with every text as
//! marked bytes, which [`text`] reads too: what cannot be read is the trouble of its own row, and a sound database pays nothing for it. PostgreSQL keeps no such text.

use std::{collections::HashSet, str};

use parking_lot::Mutex;
use sqlx::{
    AnyConnection, AssertSqlSafe, Column as _, Execute as _, Executor as _, Row as _, SqlStr, Statement as _,
    any::{AnyArguments, AnyRow},
};

use super::{Result, Store, StoreError, rows::AnyQuery, writer::Tx};

/// Before the bytes of a text. No UTF-8 begins with it, and hardly what somebody put in a text's place.
const MARK: u8 = 0xff;

/// Damaged rows that are named one by one.
const MOST_NAMED: usize = 10_000;

/// Every row of a `SELECT`.
pub(super) async fn rows(connection: &mut AnyConnection, mut query: AnyQuery<'_>) -> Result<Vec<AnyRow>> {
    let arguments = query.take_arguments().map_err(sqlx::Error::Encode)?.unwrap_or_default();
    let (sql, again) = (query.sql(), copy(&arguments));
    match sqlx::query_with(sql.clone(), arguments).fetch_all(&mut *connection).await {
        Err(error) if is_unreadable(&error) && is_sqlite(connection) => marked(connection, sql, again).await,
        other => Ok(other?),
    }
}

/// The first row of a `SELECT`.
pub(super) async fn row(connection: &mut AnyConnection, mut query: AnyQuery<'_>) -> Result<Option<AnyRow>> {
    let arguments = query.take_arguments().map_err(sqlx::Error::Encode)?.unwrap_or_default();
    let (sql, again) = (query.sql(), copy(&arguments));
    match sqlx::query_with(sql.clone(), arguments).fetch_optional(&mut *connection).await {
        Err(error) if is_unreadable(&error) && is_sqlite(connection) => {
            Ok(marked(connection, sql, again).await?.into_iter().next())
        }
        other => Ok(other?),
    }
}

impl Store {
    /// Every row of a `SELECT`, on a connection for reading.
    pub(super) async fn rows(&self, query: AnyQuery<'_>) -> Result<Vec<AnyRow>> {
        let mut connection = self.pool.acquire().await?;
        rows(&mut connection, query).await
    }

    /// The first row of a `SELECT`, on a connection for reading.
    pub(super) async fn row(&self, query: AnyQuery<'_>) -> Result<Option<AnyRow>> {
        let mut connection = self.pool.acquire().await?;
        row(&mut connection, query).await
    }

    /// The same on a connection that nothing but keys is read on.
    pub(super) async fn key_row(&self, query: AnyQuery<'_>) -> Result<Option<AnyRow>> {
        let mut connection = self.keys.acquire().await?;
        row(&mut connection, query).await
    }
}

/// The damaged rows that the log has named, each once: a client may ask for them every second.
#[derive(Debug, Default)]
pub(super) struct Named(Mutex<HashSet<String>>);

impl Store {
    /// What can be read of some rows. What cannot is left out, and named in the log.
    pub(super) fn readable<T>(
        &self,
        rows: &[AnyRow],
        read: impl Fn(&AnyRow) -> Result<T>,
        named: impl Fn(&AnyRow) -> String,
    ) -> Vec<T> {
        let read = |row: &AnyRow| match read(row) {
            Ok(read) => Some(read),
            Err(error) => {
                self.name_damaged(named(row), &error);
                None
            }
        };
        rows.iter().filter_map(read).collect()
    }

    /// Names a row that cannot be read in the log, once.
    pub(super) fn name_damaged(&self, row: String, error: &StoreError) {
        let mut named = self.named.0.lock();
        if named.len() < MOST_NAMED && !named.contains(&row) {
            tracing::error!(row, %error, "a row in the store cannot be read");
            named.insert(row);
        }
    }

    /// A page of at most `limit` rows that can be read: `query` asks for as many as it is told.
    pub(super) async fn page<T>(
        &self,
        limit: u32,
        query: impl Fn(i64) -> AnyQuery<'static>,
        read: impl Fn(&AnyRow) -> Result<T>,
        named: impl Fn(&AnyRow) -> String,
    ) -> Result<Vec<T>> {
        let mut room = limit;
        loop {
            let rows = self.rows(query(i64::from(room))).await?;
            let mut page = self.readable(&rows, &read, &named);
            let damaged = rows.len() - page.len();
            if damaged == 0 || page.len() >= limit as usize || rows.len() < room as usize {
                page.truncate(limit as usize);
                return Ok(page);
            }
            // Damaged rows took places: a page that is short would be taken for the last.
            room = room.saturating_add(damaged as u32);
        }
    }
}

impl Tx<'_> {
    /// Every row of a `SELECT`, within the transaction.
    pub(super) async fn rows(&mut self, query: AnyQuery<'_>) -> Result<Vec<AnyRow>> {
        rows(self.connection, query).await
    }

    /// The first row of a `SELECT`, within the transaction.
    pub(super) async fn row(&mut self, query: AnyQuery<'_>) -> Result<Option<AnyRow>> {
        row(self.connection, query).await
    }
}

/// Did a question fail because of what a row holds?
pub(super) fn is_unreadable(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Decode(_))
}

fn is_sqlite(connection: &AnyConnection) -> bool {
    connection.backend_name() == "SQLite"
}

fn copy(arguments: &AnyArguments) -> AnyArguments {
    let mut copy = AnyArguments::default();
    copy.values.0.clone_from(&arguments.values.0);
    copy
}

/// Asks with every text as marked bytes.
async fn marked(connection: &mut AnyConnection, sql: SqlStr, arguments: AnyArguments) -> Result<Vec<AnyRow>> {
    let statement = (&mut *connection).prepare(sql.clone()).await?;
    let names: Vec<&str> = statement.columns().iter().map(|column| column.name()).collect();
    let sql = AssertSqlSafe(in_bytes(sql.as_str(), &names));
    Ok(sqlx::query_with(sql, arguments).persistent(false).fetch_all(connection).await?)
}

fn in_bytes(sql: &str, names: &[&str]) -> String {
    let column = |(at, name): (usize, &&str)| {
        let name = name.replace('"', "\"\"");
        format!("CASE typeof(c{at}) WHEN 'text' THEN CAST(x'{MARK:02x}' || c{at} AS BLOB) ELSE c{at} END AS \"{name}\"")
    };
    let inner: Vec<String> = (0..names.len()).map(|at| format!("c{at}")).collect();
    let outer: Vec<String> = names.iter().enumerate().map(column).collect();
    format!("WITH asked ({}) AS ({sql}) SELECT {} FROM asked", inner.join(", "), outer.join(", "))
}

/// A column of text.
pub(super) fn text(row: &AnyRow, at: usize) -> Result<&str> {
    row.try_get(at).or_else(|error| unmarked_text(row, at, error))
}

/// A column of text, or nothing.
pub(super) fn optional_text(row: &AnyRow, at: usize) -> Result<Option<&str>> {
    row.try_get(at).or_else(|error| unmarked_text(row, at, error).map(Some))
}

/// As much of a column of text as can be read: to name a row.
pub(super) fn name(row: &AnyRow, at: usize) -> String {
    match (text(row, at), unmarked(row, at)) {
        (Ok(text), _) => text.to_owned(),
        (Err(_), Some(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
        (Err(_), None) => String::new(),
    }
}

/// A column that names a row, text or number.
pub(super) fn shown(row: &AnyRow, at: usize) -> String {
    row.try_get::<i64, _>(at).map_or_else(|_| name(row, at), |number| number.to_string())
}

fn unmarked_text(row: &AnyRow, at: usize, error: sqlx::Error) -> Result<&str> {
    let bytes = unmarked(row, at).ok_or(error)?;
    str::from_utf8(bytes).map_err(|_| StoreError::NotUtf8(row.column(at).name().to_owned()))
}

fn unmarked(row: &AnyRow, at: usize) -> Option<&[u8]> {
    row.try_get::<&[u8], _>(at).ok()?.strip_prefix(&[MARK])
}

#[cfg(test)]
mod tests {
    use sqlx::Connection as _;

    use super::*;

    #[tokio::test]
    async fn what_is_not_utf8_is_the_trouble_of_its_column_alone() {
        sqlx::any::install_default_drivers();
        let mut connection = AnyConnection::connect("sqlite::memory:").await.unwrap();
        let table = "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, words TEXT, data BLOB); \
                     INSERT INTO t VALUES (1, 'a', 'naïve', x'ff01'), (2, CAST(x'61ff62' AS TEXT), '', x''), \
                     (3, x'63', NULL, CAST(x'fe' AS TEXT)), (4, 'd', 'x', x'02')";
        sqlx::raw_sql(table).execute(&mut connection).await.unwrap();
        let all = "SELECT id, name, words, data, id + 1 FROM t WHERE id < $1 ORDER BY id DESC LIMIT $2";
        let found = rows(&mut connection, sqlx::query(all).bind(9i64).bind(4i64)).await.unwrap();
        let ids: Vec<i64> = found.iter().map(|row| row.get(0)).collect();
        assert_eq!(ids, [4, 3, 2, 1], "in their order");
        let [d, c, b, a] = &found[..] else { panic!() };
        assert_eq!((text(d, 1).unwrap(), d.get::<i64, _>(4)), ("d", 5));
        assert_eq!((text(a, 1).unwrap(), optional_text(a, 2).unwrap()), ("a", Some("naïve")));
        assert_eq!(a.get::<&[u8], _>(3), [0xff, 1]);
        assert!(text(c, 1).is_err(), "bytes are no text");
        assert_eq!(optional_text(c, 2).unwrap(), None);
        let words = text(b, 1).unwrap_err().to_string();
        assert!(words.contains("'name'") && words.contains("UTF-8"), "{words}");
        assert_eq!((name(b, 1), text(b, 2).unwrap()), ("a\u{fffd}b".into(), ""));
        // Questions that no such text is in are asked once, as they are.
        let sound = row(&mut connection, sqlx::query("SELECT name FROM t WHERE id = 4")).await.unwrap().unwrap();
        assert_eq!((sound.get::<&str, _>(0), text(&sound, 0).unwrap()), ("d", "d"));
        let one = row(&mut connection, sqlx::query("SELECT name FROM t WHERE id = $1").bind(2i64)).await.unwrap();
        assert!(text(&one.unwrap(), 0).is_err());
    }
}
