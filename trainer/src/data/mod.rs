//! Datasets: what a line may be, reading files as they are, prompt templates, and tokens.

mod encode;
mod item;
mod list;
mod prompt;
mod read;
mod shapes;

pub use encode::{Dataset, Encoder, Example, encode};
pub use item::{Item, Message, Prompt, Role};
pub use prompt::PromptTemplate;
pub use read::{Limits, ReadOptions, read_bytes, read_values};
pub use shapes::{default_reference, is_known_shape};

/// Where in the data a mistake is, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The data as a whole.
    All,
    /// A line of a JSONL file.
    Line(usize),
    /// An item of a list.
    Item(usize),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("the data"),
            Self::Line(line) => write!(f, "line {line}"),
            Self::Item(item) => write!(f, "item {item}"),
        }
    }
}

/// A mistake in a dataset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}{}: {message}", .field.as_ref().map(|field| format!(", `{field}`")).unwrap_or_default())]
pub struct DataError {
    /// Where.
    pub place: Place,
    /// Which field, where one is to blame.
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
}

impl DataError {
    pub(crate) fn new(place: Place, field: Option<&str>, message: impl Into<String>) -> Self {
        Self { place, field: field.map(str::to_owned), message: message.into() }
    }
}

/// All mistakes found, the first [`DataErrors::MOST`] of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataErrors(pub Vec<DataError>);

impl DataErrors {
    /// Reading stops after so many mistakes.
    pub const MOST: usize = 20;

    pub(crate) fn one(place: Place, field: Option<&str>, message: impl Into<String>) -> Self {
        Self(vec![DataError::new(place, field, message)])
    }
}

impl std::fmt::Display for DataErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "; " })?;
        }
        if self.0.len() >= Self::MOST { f.write_str("; and perhaps more") } else { Ok(()) }
    }
}

impl std::error::Error for DataErrors {}

/// Goes through things that can be wrong one by one and keeps the first mistakes.
pub(crate) fn collect<T, R>(
    things: impl IntoIterator<Item = T>,
    mut check: impl FnMut(T) -> Result<R, DataError>,
) -> Result<Vec<R>, DataErrors> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for thing in things {
        match check(thing) {
            Ok(it) => good.push(it),
            Err(error) => bad.push(error),
        }
        if bad.len() >= DataErrors::MOST {
            break;
        }
    }
    if bad.is_empty() { Ok(good) } else { Err(DataErrors(bad)) }
}
