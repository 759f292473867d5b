//! What a measurement hands back: text for people, JSON for programs.

use serde_json::{Map, Value};

use super::machine::Machine;
use crate::{app::AppError, config::ReportArgs};

/// The findings of one measurement.
#[derive(Debug, Default)]
pub(super) struct Report {
    text: String,
    json: Map<String, Value>,
}

impl Report {
    /// An empty one of this name, and of the flags that matter.
    pub(super) fn new(name: &str, flags: Value) -> Self {
        let mut report = Self::default();
        report.json.insert("bench".into(), name.into());
        report.json.insert("flags".into(), flags);
        report
    }

    /// A line for people.
    pub(super) fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// A table for people.
    pub(super) fn table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        self.text.push_str(&table(head, rows));
        self.text.push('\n');
    }

    /// Something for programs.
    pub(super) fn insert(&mut self, key: &str, value: Value) {
        self.json.insert(key.into(), value);
    }

    /// What was inserted.
    #[cfg(test)]
    pub(super) fn get(&self, key: &str) -> &Value {
        &self.json[key]
    }

    /// Writes the file, and returns the text.
    pub(super) fn finish(mut self, machine: &Machine, args: &ReportArgs) -> Result<String, AppError> {
        self.json.insert("machine".into(), machine.json());
        if let Some(path) = &args.json {
            // Numbers are finite and keys are strings, so this cannot fail.
            let text = serde_json::to_string_pretty(&Value::Object(self.json)).unwrap_or_default() + "\n";
            std::fs::write(path, text).map_err(|error| AppError::Io(path.display().to_string(), error))?;
        }
        Ok(format!("{}\n\n{}", machine.lines(), self.text.trim_end()))
    }
}

/// Columns as wide as they must be; the first to the left, the others to the right.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let width = |column: usize| {
        let cells = std::iter::once(&head).chain(rows).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "234".to_owned()]];
        assert_eq!(table(&["x", "y"], &rows), "x       y\na       1\nlong  234\n");
    }
}
