//! Kernel settings, as they are and as a command would set them.

use crate::host::sysctls;

/// The numbers of a kernel setting.
pub fn numbers(name: &str) -> Option<Vec<u64>> {
    let text = sysctls::read(name)?;
    text.split_whitespace()
        .map(|number| number.parse().ok())
        .collect()
}

/// The command that changes a kernel setting. Names of interfaces may have dots, so it goes by the path.
pub fn set(name: &str, value: impl std::fmt::Display) -> Option<String> {
    Some(format!("sysctl -w {name}='{value}'"))
}
