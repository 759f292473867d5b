//! A JSON list cut into its items without reading them, so that each can be measured before anything of it is built.

/// The items of a list, in bytes. Every one has to be read as JSON yet.
///
/// # Errors
/// The line, counted from 1, at which the data ends before the list does, or goes on after it.
pub(super) fn split(data: &[u8]) -> Result<Vec<&[u8]>, usize> {
    let line = |at: usize| 1 + data[..at].iter().filter(|&&byte| byte == b'\n').count();
    let begin = data.iter().position(|&byte| byte == b'[').map_or(data.len(), |at| at + 1);
    let (mut items, mut start) = (Vec::new(), begin);
    let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
    for (at, &byte) in data.iter().enumerate().skip(begin) {
        if quoted {
            quoted = escaped || byte != b'"';
            escaped = byte == b'\\' && !escaped;
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' if depth > 0 => depth -= 1,
            b',' if depth == 0 => {
                items.push(&data[start..at]);
                start = at + 1;
            }
            b']' => {
                let last = &data[start..at];
                if !items.is_empty() || !last.trim_ascii().is_empty() {
                    items.push(last);
                }
                let rest = &data[at + 1..];
                let after = rest.iter().position(|byte| !byte.is_ascii_whitespace());
                return after.map_or(Ok(items), |beyond| Err(line(at + 1 + beyond)));
            }
            _ => {}
        }
    }
    Err(line(data.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn items_are_cut_where_json_has_them() {
        let cut = |data: &'static str| {
            split(data.as_bytes())
                .map(|items| items.into_iter().map(|item| str::from_utf8(item).unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(cut("[]"), Ok(vec![]));
        assert_eq!(cut(" [ ]\n"), Ok(vec![]));
        assert_eq!(cut("[1,[2,3],{\"a\":[4]}]"), Ok(vec!["1", "[2,3]", "{\"a\":[4]}"]));
        assert_eq!(cut(r#"["a,]\"[", "\\",3]"#), Ok(vec![r#""a,]\"[""#, r#" "\\""#, "3"]));
        assert_eq!(cut("[1,]"), Ok(vec!["1", ""]), "an empty item, which is no JSON");
        assert_eq!(cut("[1"), Err(1));
        assert_eq!(cut("[\n\"a]"), Err(2));
        assert_eq!(cut("[1]\n\n2"), Err(3));
        assert_eq!(cut("[1]]"), Err(1));
    }

    proptest! {
        #[test]
        fn cutting_and_reading_is_reading(data in prop_oneof![
            "[\\[\\]{},:\"\\\\ a0\n]{0,40}",
            prop::collection::vec("[a\\[\\],\"\\\\{}]{0,6}", 0..6).prop_map(|texts| serde_json::to_string(&texts).unwrap()),
        ]) {
            prop_assume!(data.trim_start().starts_with('['));
            let whole: Option<Vec<Value>> = serde_json::from_str(&data).ok();
            let cut = split(data.as_bytes()).ok().and_then(|items| items.into_iter().map(|item| serde_json::from_slice(item).ok()).collect());
            prop_assert_eq!(whole, cut);
        }
    }
}
