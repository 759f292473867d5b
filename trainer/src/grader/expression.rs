//! Arithmetic over scores: `+ - * / ^`, parentheses, and min, max, abs, floor, ceil, exp, sqrt, log (OpenAI's list).

const MAX_LENGTH: usize = 1024;
const MAX_DEPTH: usize = 32;
const FUNCTIONS: [&str; 8] = ["min", "max", "abs", "floor", "ceil", "exp", "sqrt", "log"];

/// May scores be called this in a formula?
pub(super) fn is_name(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !FUNCTIONS.contains(&name)
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Number(f64),
    Score(usize),
    Negated(Box<Node>),
    Binary(char, Box<Node>, Box<Node>),
    Call(&'static str, Vec<Node>),
}

/// A checked formula.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Expression(Node);

impl Expression {
    /// Reads a formula over these names.
    pub(super) fn parse(source: &str, names: &[String]) -> Result<Self, String> {
        if source.len() > MAX_LENGTH {
            return Err(format!("is longer than {MAX_LENGTH} bytes"));
        }
        let mut parser = Parser { source, at: 0, names };
        let node = parser.sum(0)?;
        match parser.peek() {
            None => Ok(Self(node)),
            Some(c) => Err(format!("unexpected `{c}`")),
        }
    }

    /// The value at these scores, in the order of the names; finite.
    pub(super) fn evaluate(&self, scores: &[f64]) -> Result<f64, String> {
        let value = self.0.evaluate(scores);
        if (value as f32).is_finite() {
            Ok(value)
        } else {
            Err(format!("the formula gives {value}, not a finite number"))
        }
    }
}

impl Node {
    fn evaluate(&self, scores: &[f64]) -> f64 {
        match self {
            Self::Number(number) => *number,
            Self::Score(index) => scores[*index],
            Self::Negated(node) => -node.evaluate(scores),
            Self::Binary(operator, left, right) => {
                let (left, right) = (left.evaluate(scores), right.evaluate(scores));
                match operator {
                    '+' => left + right,
                    '-' => left - right,
                    '*' => left * right,
                    '/' => left / right,
                    _ => left.powf(right),
                }
            }
            Self::Call(name, arguments) => {
                let values: Vec<f64> = arguments.iter().map(|argument| argument.evaluate(scores)).collect();
                match *name {
                    "min" => values.into_iter().fold(f64::INFINITY, f64::min),
                    "max" => values.into_iter().fold(f64::NEG_INFINITY, f64::max),
                    "abs" => values[0].abs(),
                    "floor" => values[0].floor(),
                    "ceil" => values[0].ceil(),
                    "exp" => values[0].exp(),
                    "sqrt" => values[0].sqrt(),
                    _ => values[0].ln(),
                }
            }
        }
    }
}

/// Recursive descent, its depth counted.
struct Parser<'a> {
    source: &'a str,
    at: usize,
    names: &'a [String],
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<char> {
        let rest = &self.source[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.source[self.at..].chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += if found { wanted.len_utf8() } else { 0 };
        found
    }

    /// `product (+|- product)*`
    fn sum(&mut self, depth: usize) -> Result<Node, String> {
        if depth > MAX_DEPTH {
            return Err(format!("is nested deeper than {MAX_DEPTH}"));
        }
        let mut left = self.product(depth)?;
        while let Some(operator @ ('+' | '-')) = self.peek() {
            self.at += 1;
            left = Node::Binary(operator, Box::new(left), Box::new(self.product(depth)?));
        }
        Ok(left)
    }

    /// `signed (*|/ signed)*`
    fn product(&mut self, depth: usize) -> Result<Node, String> {
        let mut left = self.signed(depth)?;
        while let Some(operator @ ('*' | '/')) = self.peek() {
            self.at += 1;
            left = Node::Binary(operator, Box::new(left), Box::new(self.signed(depth)?));
        }
        Ok(left)
    }

    /// `-signed | power`: a sign binds weaker than `^`, so -2^2 is -4.
    fn signed(&mut self, depth: usize) -> Result<Node, String> {
        if depth > MAX_DEPTH {
            return Err(format!("is nested deeper than {MAX_DEPTH}"));
        }
        if self.take('-') {
            return Ok(Node::Negated(Box::new(self.signed(depth + 1)?)));
        }
        let base = self.atom(depth)?;
        if self.take('^') {
            return Ok(Node::Binary('^', Box::new(base), Box::new(self.signed(depth + 1)?)));
        }
        Ok(base)
    }

    fn atom(&mut self, depth: usize) -> Result<Node, String> {
        match self.peek() {
            None => Err("ends too early".to_owned()),
            Some('(') => {
                self.at += 1;
                let inside = self.sum(depth + 1)?;
                if self.take(')') { Ok(inside) } else { Err("a `(` is not closed".to_owned()) }
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                let name = self.word(|c| c.is_ascii_alphanumeric() || c == '_').to_owned();
                if let Some(function) = FUNCTIONS.into_iter().find(|function| *function == name) {
                    return self.call(function, depth);
                }
                let index = self.names.iter().position(|known| *known == name);
                index.map(Node::Score).ok_or_else(|| format!("unknown name `{name}`"))
            }
            Some(c) => Err(format!("unexpected `{c}`")),
        }
    }

    fn number(&mut self) -> Result<Node, String> {
        let digits = self.word(|c| c.is_ascii_digit() || c == '.');
        digits.parse().map(Node::Number).map_err(|_| format!("`{digits}` is not a number"))
    }

    fn word(&mut self, belongs: impl Fn(char) -> bool) -> &str {
        let start = self.at;
        let rest = &self.source[start..];
        self.at += rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        &self.source[start..self.at]
    }

    fn call(&mut self, function: &'static str, depth: usize) -> Result<Node, String> {
        if !self.take('(') {
            return Err(format!("`{function}` needs a `(`"));
        }
        let mut arguments = vec![self.sum(depth + 1)?];
        while self.take(',') {
            arguments.push(self.sum(depth + 1)?);
        }
        if !self.take(')') {
            return Err("a `(` is not closed".to_owned());
        }
        let many = matches!(function, "min" | "max");
        if !many && arguments.len() != 1 {
            return Err(format!("`{function}` takes one argument"));
        }
        Ok(Node::Call(function, arguments))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(source: &str) -> Result<f64, String> {
        let names = ["a".to_owned(), "b_2".to_owned()];
        Expression::parse(source, &names)?.evaluate(&[0.5, 4.0])
    }

    #[test]
    fn formulas_mean_what_they_say() {
        for (source, want) in [
            ("1 + 2 * 3", 7.0),
            ("(1 + 2) * 3", 9.0),
            ("8 / 4 / 2", 1.0),
            ("5 - 3 - 1", 1.0),
            ("2 ^ 3 ^ 2", 512.0),
            ("-2 ^ 2", -4.0),
            ("2 ^ -1", 0.5),
            ("--a", 0.5),
            ("a * b_2", 2.0),
            ("min(a, b_2, 0.25) + max(a)", 0.75),
            ("sqrt(b_2) + abs(-a) + floor(a) + ceil(a)", 3.5),
            ("exp(0) + log(1)", 1.0),
            (".5", 0.5),
        ] {
            assert_eq!(value(source), Ok(want), "{source}");
        }
    }

    #[test]
    fn mistakes_are_told() {
        for (source, want) in [
            ("", "ends too early"),
            ("a +", "ends too early"),
            ("a b_2", "unexpected `b`"),
            ("a $ 1", "unexpected `$`"),
            ("(a", "not closed"),
            ("min(a", "not closed"),
            ("sqrt a", "needs a `(`"),
            ("sqrt(a, a)", "takes one argument"),
            ("c", "unknown name `c`"),
            ("1.2.3", "not a number"),
            ("1 / (a - a)", "not a finite"),
            ("log(-1)", "not a finite"),
            ("10 ^ 300", "not a finite"),
        ] {
            let error = value(source).unwrap_err();
            assert!(error.contains(want), "{source}: {error}");
        }
        assert!(value(&format!("{}1{}", "(".repeat(400), ")".repeat(400))).unwrap_err().contains("nested"));
        assert!(value(&"-".repeat(500)).unwrap_err().contains("nested"));
        assert!(value(&"2^".repeat(500)).unwrap_err().contains("nested"));
        assert!(value(&"1+".repeat(600)).unwrap_err().contains("longer"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(source in "[-+*/^()a-c0-9. ,]{0,60}|min\\(.{0,20}") {
            let _ = value(&source);
        }
    }
}
