//! Writing adapters: uploads in bulk, deletion, rollback.

mod history;
mod known;
mod uploads;

pub use history::HISTORY;
#[cfg(test)]
pub(super) use history::NEWEST_AND_SEQ_OF;
pub(super) use history::SEQ_OF;
pub(super) use known::{KNOWN_OF_ONE, Known, bind_known};
pub(super) use uploads::{Created, INSERT_ONE};
