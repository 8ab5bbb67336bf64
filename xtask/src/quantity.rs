//! Parses and formats numbers with units, as in `tc`.

use std::time::Duration;

const RATES: &[(&str, f64)] = &[("bit", 1.0), ("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)];
const TIMES: &[(&str, f64)] = &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
const SHARES: &[(&str, f64)] = &[("%", 0.01)];
const SIZES: &[(&str, f64)] = &[
    ("B", 1.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
];

/// Parses a rate in bit/s: `50mbit`.
pub fn rate_bps(text: &str) -> Result<u64, String> {
    let rate = with_unit(text, RATES)?;
    within(rate, 1e3, 10e9, "from 1kbit to 10gbit").map(|rate| rate as u64)
}

/// Parses a time: `600ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let seconds = with_unit(text, TIMES)?;
    within(seconds, 0.0, 10.0, "from 0s to 10s").map(Duration::from_secs_f64)
}

/// Parses a timeout: `150s`.
pub fn patience(text: &str) -> Result<Duration, String> {
    let seconds = with_unit(text, TIMES)?;
    within(seconds, 1.0, 86_400.0, "from 1s to 86400s").map(Duration::from_secs_f64)
}

/// Parses a probability in percent: `1%`.
pub fn loss(text: &str) -> Result<f64, String> {
    let share = with_unit(text, SHARES)?;
    within(share, 0.0, 0.5, "from 0% to 50%")
}

/// Parses a size in bytes: `3MiB`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let bytes = with_unit(text, SIZES)?;
    within(bytes, 1.0, 1e12, "from 1B to 1000GB").map(|bytes| bytes as u64)
}

/// Formats a rate in its largest exact unit, for [`rate_bps`]: `50mbit`.
pub fn exact_rate(bps: u64) -> String {
    match bps {
        _ if bps.is_multiple_of(1_000_000) => format!("{}mbit", bps / 1_000_000),
        _ if bps.is_multiple_of(1_000) => format!("{}kbit", bps / 1_000),
        _ => format!("{bps}bit"),
    }
}

/// Formats a time in its largest exact unit, for [`duration`]: `600ms`.
pub fn exact_time(time: Duration) -> String {
    match time.as_micros() {
        us if us % 1_000 == 0 => format!("{}ms", us / 1_000),
        us => format!("{us}us"),
    }
}

/// Formats a size: `3.0 MiB`.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1_048_576.0)
}

fn with_unit(text: &str, units: &[(&str, f64)]) -> Result<f64, String> {
    let end = text
        .find(|c: char| c != '.' && !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number
        .parse::<f64>()
        .map_err(|_| "it does not begin with a number".to_owned())?;
    let unit = unit.trim_start();
    match units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
        Some((_, factor)) => Ok(number * factor),
        None => {
            let names: Vec<_> = units.iter().map(|(name, _)| *name).collect();
            Err(format!("its unit has to be {}", names.join(" or ")))
        }
    }
}

fn within(value: f64, least: f64, most: f64, range: &str) -> Result<f64, String> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(format!("it has to be {range}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_scale() {
        assert_eq!(rate_bps("50mbit"), Ok(50_000_000));
        assert_eq!(rate_bps("1.5 Gbit"), Ok(1_500_000_000));
        assert_eq!(duration("600ms"), Ok(Duration::from_millis(600)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        assert_eq!(patience("150s"), Ok(Duration::from_secs(150)));
        assert_eq!(loss("1%"), Ok(0.01));
        assert_eq!(bytes("10MiB"), Ok(10_485_760));
        assert_eq!(bytes("2kB"), Ok(2_000));
    }

    #[test]
    fn exact_quantities_read_back() {
        for bps in [50_000_000, 1_500_000, 1_001] {
            assert_eq!(rate_bps(&exact_rate(bps)), Ok(bps));
        }
        for us in [600_000, 1_500] {
            let time = Duration::from_micros(us);
            assert_eq!(duration(&exact_time(time)), Ok(time));
        }
        assert_eq!(exact_rate(50_000_000), "50mbit");
        assert_eq!(exact_time(Duration::from_millis(600)), "600ms");
    }

    #[test]
    fn bad_values_say_what_is_wrong() {
        assert_eq!(
            rate_bps("50").unwrap_err(),
            "its unit has to be bit or kbit or mbit or gbit"
        );
        assert_eq!(
            duration("600 lightyears").unwrap_err(),
            "its unit has to be us or ms or s"
        );
        assert_eq!(loss("none").unwrap_err(), "it does not begin with a number");
        assert_eq!(loss("-1%").unwrap_err(), "it does not begin with a number");
        assert_eq!(loss("60%").unwrap_err(), "it has to be from 0% to 50%");
        assert_eq!(bytes("0B").unwrap_err(), "it has to be from 1B to 1000GB");
        assert_eq!(bytes("").unwrap_err(), "it does not begin with a number");
    }
}
