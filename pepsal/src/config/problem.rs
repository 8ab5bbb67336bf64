//! Errors of a configuration file, with their positions.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// An error, as one line: `FILE:LINE:COLUMN: what`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    file: PathBuf,
    /// Line and column, from one; `None` for an error of the whole file.
    position: Option<(usize, usize)>,
    what: String,
}

impl Problem {
    /// Creates an error of the whole file.
    pub fn of_file(file: &Path, what: &str) -> Self {
        Self {
            file: file.to_owned(),
            position: None,
            what: what.to_owned(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some((line, column)) = self.position {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {}", self.what)
    }
}

/// The text of a file, to find positions in it.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    file: &'a Path,
    content: &'a str,
}

impl<'a> Text<'a> {
    /// Indexes the lines of a text.
    pub fn new(file: &'a Path, content: &'a str) -> Self {
        Self { file, content }
    }

    /// Creates an error at a byte offset of the text. Columns count characters.
    pub fn problem(&self, at: usize, what: &str) -> Problem {
        let mut end = at.min(self.content.len());
        while !self.content.is_char_boundary(end) {
            end -= 1;
        }
        let before = &self.content[..end];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Problem {
            file: self.file.to_owned(),
            position: Some((line, column)),
            what: what.replace('\n', ", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let text = Text::new(Path::new("a.toml"), "x = 1\n\"ü\" = 2\n");
        for (at, position) in [
            (0, "a.toml:1:1: wrong"),
            (4, "a.toml:1:5: wrong"),
            (6, "a.toml:2:1: wrong"),
            (8, "a.toml:2:2: wrong"),
            (11, "a.toml:2:5: wrong"),
            (99, "a.toml:3:1: wrong"),
        ] {
            assert_eq!(text.problem(at, "wrong").to_string(), position);
        }
    }
}
