//! Statements over many rows: `VALUES ($1, $2), ($3, $4), ...` in a few sizes, so that each is prepared once.
//!
//! On SQLite the parameters are `?`: it looks up a named one by walking all names, which takes longer than the insert.

use std::{fmt::Write as _, sync::OnceLock};

use sqlx::{AssertSqlSafe, SqlSafeStr as _, SqlStr};

/// A question whose parameters are being bound.
pub(super) type AnyQuery<'q> = sqlx::query::Query<'q, sqlx::Any, sqlx::any::AnyArguments>;

/// Rows a statement may have. With up to 10 columns the largest stays under SQLite's 32,766 parameters and PostgreSQL's 65,535.
const SIZES: [usize; 6] = [1024, 256, 64, 16, 4, 1];

/// A statement with a list of rows in its middle.
pub(super) struct RowsSql {
    head: &'static str,
    columns: usize,
    tail: &'static str,
    statements: [[OnceLock<SqlStr>; SIZES.len()]; 2],
}

/// How parameters are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// `?`
    Sqlite,
    /// `$1`
    Postgres,
}

impl RowsSql {
    /// `head`, rows of so many parameters, `tail`.
    pub(super) const fn new(head: &'static str, columns: usize, tail: &'static str) -> Self {
        Self { head, columns, tail, statements: [const { [const { OnceLock::new() }; SIZES.len()] }; 2] }
    }

    /// Cuts items into pieces that have a statement of exactly their size.
    pub(super) fn exact<'a, T>(
        &'static self,
        dialect: Dialect,
        mut items: &'a [T],
    ) -> impl Iterator<Item = (SqlStr, &'a [T])> {
        std::iter::from_fn(move || {
            let index = SIZES.iter().position(|size| *size <= items.len())?;
            let (piece, rest) = items.split_at(SIZES[index]);
            items = rest;
            Some((self.statement(dialect, index), piece))
        })
    }

    /// Cuts items into pieces and gives the smallest statement that holds each, with its size: the caller repeats the last item to
    /// fill it. For statements in which a repeated row changes nothing.
    pub(super) fn padded<'a, T>(
        &'static self,
        dialect: Dialect,
        items: &'a [T],
    ) -> impl Iterator<Item = (SqlStr, usize, &'a [T])> {
        items.chunks(SIZES[0]).map(move |piece| {
            // The sizes fall, and a piece is no larger than the first.
            let index = SIZES.iter().rposition(|size| *size >= piece.len()).unwrap_or(0);
            (self.statement(dialect, index), SIZES[index], piece)
        })
    }

    /// A row of this and another statement in one text, whose parameters follow one another: SQLite only.
    pub(super) fn one_then(&self, statement: &str) -> SqlStr {
        AssertSqlSafe(format!("{}; {statement}", self.one().as_str())).into_sql_str()
    }

    /// A row, as SQLite takes it.
    pub(super) fn one(&self) -> SqlStr {
        self.build(Dialect::Sqlite, 1)
    }

    fn statement(&self, dialect: Dialect, index: usize) -> SqlStr {
        self.statements[dialect as usize][index].get_or_init(|| self.build(dialect, SIZES[index])).clone()
    }

    fn build(&self, dialect: Dialect, rows: usize) -> SqlStr {
        let mut sql = String::from(self.head);
        for row in 0..rows {
            sql.push_str(if row == 0 { " (" } else { ", (" });
            for column in 0..self.columns {
                let separator = if column == 0 { "" } else { ", " };
                // Writing to a String does not fail.
                let _ = match dialect {
                    Dialect::Sqlite => write!(sql, "{separator}?"),
                    Dialect::Postgres => write!(sql, "{separator}${}", row * self.columns + column + 1),
                };
            }
            sql.push(')');
        }
        sql.push_str(self.tail);
        AssertSqlSafe(sql).into_sql_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static SQL: RowsSql = RowsSql::new("VALUES", 2, ";");

    #[test]
    fn pieces_cover_every_item_once() {
        for count in [0, 1, 3, 4, 5, 63, 64, 100, 1023, 1024, 5000] {
            let items: Vec<usize> = (0..count).collect();
            let exact: Vec<usize> = SQL.exact(Dialect::Sqlite, &items).flat_map(|(_, piece)| piece.to_vec()).collect();
            assert_eq!(exact, items);
            let mut padded = Vec::new();
            for (sql, size, piece) in SQL.padded(Dialect::Postgres, &items) {
                assert!(piece.len() <= size);
                assert!(sql.as_str().ends_with(&format!("${});", 2 * size)));
                padded.extend_from_slice(piece);
            }
            assert_eq!(padded, items);
        }
        let (sql, ..) = SQL.padded(Dialect::Postgres, &[0, 1]).next().unwrap();
        assert_eq!(sql.as_str(), "VALUES ($1, $2), ($3, $4), ($5, $6), ($7, $8);");
        let (sql, ..) = SQL.padded(Dialect::Sqlite, &[0]).next().unwrap();
        assert_eq!(sql.as_str(), "VALUES (?, ?);");
    }
}
