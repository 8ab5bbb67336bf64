//! Tables in a terminal.

/// Alignment of a column.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Formats rows in columns of minimum width.
pub fn aligned<const N: usize>(rows: &[[String; N]], alignment: [Align; N]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let mut table = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            line += &match alignment[column] {
                Align::Left => format!("{cell:width$}  "),
                Align::Right => format!("{cell:>width$}  "),
            };
        }
        table += line.trim_end();
        table += "\n";
    }
    table
}

/// Formats rows as GitHub's Markdown; the first row is the heading.
pub fn markdown<const N: usize>(rows: &[[String; N]], alignment: [Align; N]) -> String {
    let Some((heading, rows)) = rows.split_first() else {
        return String::new();
    };
    let line = |cells: &[String; N]| {
        let cells = cells.each_ref().map(|cell| cell.replace('|', "\\|"));
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = alignment.map(|align| match align {
        Align::Left => "---".to_owned(),
        Align::Right => "--:".to_owned(),
    });
    [heading, &rule].into_iter().chain(rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: [[&str; 2]; 2] = [["what", "seconds"], ["a | b", "1.5"]];
    const ALIGNMENT: [Align; 2] = [Align::Left, Align::Right];

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = ROWS.map(|row| row.map(str::to_owned));
        assert_eq!(aligned(&rows, ALIGNMENT), "what   seconds\na | b      1.5\n");
    }

    #[test]
    fn markdown_has_a_rule_below_the_heading_and_no_stray_bars() {
        let rows = ROWS.map(|row| row.map(str::to_owned));
        assert_eq!(
            markdown(&rows, ALIGNMENT),
            "| what | seconds |\n| --- | --: |\n| a \\| b | 1.5 |\n"
        );
    }
}
