//! Parses and formats rates, times and sizes: a number with its unit.

use std::{fmt, time::Duration};

/// A rate in bits per second, like `50mbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

impl Rate {
    /// Creates a rate from bits per second.
    pub const fn from_bps(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns bits per second.
    pub const fn bps(self) -> u64 {
        self.0
    }

    /// Returns the bytes in a time at this rate.
    pub fn bytes_in(self, time: Duration) -> u64 {
        (u128::from(self.0) * time.as_nanos() / 8_000_000_000)
            .try_into()
            .unwrap_or(u64::MAX)
    }
}

const RATES: [(&str, u64); 4] = [
    ("kbit", 1_000),
    ("mbit", 1_000_000),
    ("gbit", 1_000_000_000),
    ("bit", 1),
];

const SIZES: [(&str, u64); 7] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("b", 1),
];

/// Parses a rate from 1 kbit to 100 Gbit per second: `50mbit`, `50 Mbit/s`, `2.5gbit`.
///
/// # Errors
/// One line with the error and an example.
pub fn rate(text: &str) -> Result<Rate, String> {
    let plain = text.to_ascii_lowercase();
    let plain = plain.strip_suffix("/s").unwrap_or(&plain);
    match scaled(plain, &RATES) {
        Some(bps @ 1_000..=100_000_000_000) => Ok(Rate(bps)),
        Some(_) => Err(format!(
            "'{text}' is out of range: a rate is from 1kbit to 100gbit"
        )),
        None => Err(format!(
            "'{text}' is not a rate: give a number with kbit, mbit or gbit, like 50mbit"
        )),
    }
}

/// Parses a size of up to 4 GiB, in bytes: `64KiB`, `1.5MB`, `1500B`.
///
/// # Errors
/// One line with the error and an example.
pub fn size(text: &str) -> Result<u64, String> {
    match scaled(&text.to_ascii_lowercase(), &SIZES) {
        Some(bytes @ 1..=0x1_0000_0000) => Ok(bytes),
        Some(_) => Err(format!("'{text}' is out of range: a size is from 1B to 4GiB")),
        None => Err(format!(
            "'{text}' is not a size: give a number with B, KiB, MiB, KB or MB, like 64KiB"
        )),
    }
}

/// Parses a time with its unit: `600ms`, `5min`, `1h 30min`.
///
/// # Errors
/// One line with the error and an example.
pub fn time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time <= Duration::from_secs(u32::MAX.into()) => Ok(time),
        Ok(_) => Err(format!("'{text}' is out of range: a time is at most 136 years")),
        Err(_) => Err(format!(
            "'{text}' is not a time: give a number with us, ms, s, min or h, like 600ms"
        )),
    }
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, factor) = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?.trim_end(), *factor)))?;
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number = plain.then(|| number.parse::<f64>().ok())??;
    let value = (number * factor as f64).round();
    (value < u64::MAX as f64).then_some(value as u64)
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bps = self.0 as f64;
        match self.0 {
            1_000_000_000.. => write!(f, "{} Gbit/s", short(bps / 1e9)),
            1_000_000.. => write!(f, "{} Mbit/s", short(bps / 1e6)),
            _ => write!(f, "{} kbit/s", short(bps / 1e3)),
        }
    }
}

/// Formats a number of bytes.
pub fn show_size(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0x10_0000.. => format!("{} MiB", short(value / 1_048_576.0)),
        0x400.. => format!("{} KiB", short(value / 1024.0)),
        _ => format!("{bytes} B"),
    }
}

/// Formats a number with at most three decimals, without trailing zeros.
fn short(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_units() {
        for (text, bps) in [
            ("50mbit", 50_000_000),
            ("50 Mbit/s", 50_000_000),
            ("2.5gbit", 2_500_000_000),
            ("64kbit/s", 64_000),
            ("9600bit", 9_600),
        ] {
            assert_eq!(rate(text).map(Rate::bps), Ok(bps), "{text}");
        }
        for text in ["50", "", "mbit", "-1mbit", "1e3mbit", "nanmbit", "50mbyte"] {
            assert!(rate(text).unwrap_err().contains("is not a rate"), "{text}");
        }
        for text in ["0mbit", "999bit", "101gbit"] {
            assert!(rate(text).unwrap_err().contains("out of range"), "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("64KiB"), Ok(65_536));
        assert_eq!(size("1.5MB"), Ok(1_500_000));
        assert_eq!(size("1500B"), Ok(1500));
        assert!(size("1500").unwrap_err().contains("is not a size"));
        assert!(size("5GiB").unwrap_err().contains("out of range"));
    }

    #[test]
    fn times_have_units() {
        assert_eq!(time("600ms"), Ok(Duration::from_millis(600)));
        assert!(time("600").unwrap_err().contains("is not a time"));
    }

    #[test]
    fn values_read_back_as_people_write_them() {
        assert_eq!(Rate::from_bps(50_000_000).to_string(), "50 Mbit/s");
        assert_eq!(Rate::from_bps(2_500_000_000).to_string(), "2.5 Gbit/s");
        assert_eq!(show_size(3_750_000), "3.58 MiB");
        assert_eq!(
            Rate::from_bps(50_000_000).bytes_in(Duration::from_millis(600)),
            3_750_000
        );
    }
}
