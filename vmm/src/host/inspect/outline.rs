//! An outline: on a terminal a tree with bars for sizes, elsewhere plain lines.

use std::io::IsTerminal;

use crate::host::report;

/// A line and what is below it.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    label: String,
    value: String,
    bytes: Option<u64>,
    children: Vec<Outline>,
}

/// The longest bar.
const BAR: u64 = 24;

impl Outline {
    /// A line without anything below it.
    pub fn new(label: impl Into<String>, value: impl Into<String>) -> Self {
        Self { label: label.into(), value: value.into(), ..Self::default() }
    }

    /// A line about so much memory: compared with those beside it by a bar.
    pub fn memory(label: impl Into<String>, bytes: u64) -> Self {
        Self { label: label.into(), value: report::bytes(bytes), bytes: Some(bytes), children: Vec::new() }
    }

    /// The same with more to say.
    pub fn with_value(mut self, value: &str) -> Self {
        self.value = if self.value.is_empty() { value.to_owned() } else { format!("{}, {value}", self.value) };
        self
    }

    /// The same with another line below it.
    pub fn with(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    /// The same with more lines below it.
    pub fn with_all(mut self, children: impl IntoIterator<Item = Self>) -> Self {
        self.children.extend(children);
        self
    }

    /// As the standard output wants it.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text, "", "", std::io::stdout().is_terminal(), 0);
        text
    }

    fn write(&self, text: &mut String, lead: &str, below: &str, terminal: bool, most: u64) {
        let Self { label, value, bytes, children } = self;
        let bar = match bytes {
            Some(bytes) if terminal && most > 0 => {
                let length = (u128::from(*bytes) * u128::from(BAR)).div_ceil(u128::from(most));
                format!("  {}", "▇".repeat(length as usize))
            }
            _ => String::new(),
        };
        let value = if value.is_empty() { String::new() } else { format!(": {value}") };
        text.push_str(&format!("{lead}{label}{value}{bar}\n"));
        let most = children.iter().filter_map(|child| child.bytes).max().unwrap_or_default();
        for (number, child) in children.iter().enumerate() {
            let last = number + 1 == children.len();
            let (branch, line) = match (terminal, last) {
                (false, _) => ("  ", "  "),
                (true, false) => ("├─ ", "│  "),
                (true, true) => ("└─ ", "   "),
            };
            child.write(text, &format!("{below}{branch}"), &format!("{below}{line}"), terminal, most);
        }
    }
}
