//! Reads sysctls, and makes the commands that set them.

use crate::host::sysctls;

/// Returns the numbers of a sysctl; none when it is missing or no number.
pub fn numbers(name: &str) -> Option<Vec<u64>> {
    let text = sysctls::read(name)?;
    text.split_whitespace()
        .map(|number| number.parse().ok())
        .collect()
}

/// Returns the command that sets a sysctl, by path, because interface names may contain dots.
pub fn set(name: &str, value: impl std::fmt::Display) -> Option<String> {
    Some(format!("sysctl -w {name}='{value}'"))
}
