//! Stop strings across token borders.

/// Holds back text that could be the start of a stop string.
///
/// What it lets through never contains a stop string nor anything after one, wherever tokens cut the text.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Stops at the first occurrence of any of these; empty strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Is there nothing to stop at?
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// Adds text: what may be shown now, and whether a stop string was found. After that nothing more is let through.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| longest_border(&self.held, stop)).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// What was held back when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that is a proper start of `stop`.
fn longest_border(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(at, _)| at).rev().find(|&at| text.ends_with(&stop[..at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut filter = StopStrings::new(stops.iter().map(|stop| stop.to_string()));
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, stopped) = filter.push(piece);
            shown.push(text);
            if stopped {
                return (shown, true);
            }
        }
        shown.push(filter.finish());
        (shown, false)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_not_shown() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), (vec!["a ".into(), String::new(), String::new()], true));
        assert_eq!(run(&["\n\n"], &["x\n", "y\n", "\nz"]), (vec!["x".into(), "\ny".into(), String::new()], true));
    }

    #[test]
    fn a_false_start_is_shown_once_it_is_known_to_be_one() {
        assert_eq!(
            run(&["aab"], &["aa", "a", "c"]),
            (vec![String::new(), "a".into(), "aac".into(), String::new()], false)
        );
        assert_eq!(run(&["END"], &["EN"]), (vec![String::new(), "EN".into()], false));
    }

    #[test]
    fn the_earliest_of_several_wins_and_characters_stay_whole() {
        assert_eq!(run(&["cd", "b"], &["abcd"]), (vec!["a".into()], true));
        assert_eq!(
            run(&["é!"], &["caf", "é", "?"]),
            (vec!["caf".into(), String::new(), "é?".into(), String::new()], false)
        );
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "[ab]{0,16}", stops in prop::collection::vec("[ab]{1,4}", 0..3), cut in 0usize..17) {
            let cut = cut.min(text.len());
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (shown, stopped) = run(&stops, &[&text[..cut], &text[cut..]]);
            let first = stops.iter().filter_map(|stop| text.find(stop)).min();
            prop_assert_eq!(stopped, first.is_some());
            // A cut can only make the filter stop at a stop string that ends earlier; it never shows one.
            if let Some(at) = first {
                prop_assert!(text.starts_with(&shown.concat()));
                prop_assert!(shown.concat().len() >= at);
                prop_assert!(stops.iter().all(|stop| !shown.concat().contains(stop)));
            } else {
                prop_assert_eq!(shown.concat(), text);
            }
        }
    }
}
