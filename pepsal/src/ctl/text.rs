//! Formats figures for the terminal.

/// Formats bytes, in three or four characters and a unit.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Formats a rate in bits per second, from bytes per second.
pub fn rate(bytes_per_second: f64) -> String {
    scaled(
        bytes_per_second * 8.0,
        1000.0,
        &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"],
    )
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 999.6 would be rounded to four digits.
    while value >= step - 0.5 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.digits$} {}", units[unit])
}

pub fn round_trip(seconds: Option<f64>) -> String {
    match seconds {
        None => "-".into(),
        Some(seconds) if seconds < 0.01 => format!("{:.2} ms", seconds * 1e3),
        Some(seconds) => format!("{:.0} ms", seconds * 1e3),
    }
}

/// Formats a duration, by its two largest units.
pub fn age(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {}s", s / 60, s % 60),
        3600..86_400 => format!("{}h {}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d {}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Formats rows below their headings, with columns of minimum width. Columns from `right` on are
/// right-aligned.
pub fn table(headings: &[&str], rows: &[Vec<String>], right: usize) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, &width))| match column < right {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    let headings: Vec<String> = headings.iter().map(|&heading| heading.to_owned()).collect();
    let mut text = line(&headings);
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(10 << 20), "10.0 MiB");
        assert_eq!(rate(6_250_000.0), "50.0 Mbit/s");
        assert_eq!(rate(0.0), "0 bit/s");
        assert_eq!(rate(124_990.0), "1000 kbit/s".replace("1000 k", "1.0 M"));
        assert_eq!(round_trip(Some(0.6)), "600 ms");
        assert_eq!(round_trip(Some(0.000_15)), "0.15 ms");
        assert_eq!(age(59.9), "59s");
        assert_eq!(age(93_784.0), "1d 2h");
    }

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let rows = [
            vec!["a".to_owned(), "1".to_owned()],
            vec!["long".into(), "20".into()],
        ];
        assert_eq!(table(&["X", "N"], &rows, 1), "X      N\na      1\nlong  20\n");
    }
}
