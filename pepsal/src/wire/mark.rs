//! The packet mark of server legs' packets on their way into the host.

use std::{fmt, str::FromStr};

/// A packet mark and the bits that it is allowed to touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The bits to set.
    pub value: u32,
    /// The bits that are pepsal's.
    pub mask: u32,
}

impl FromStr for Mark {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (value, mask) = text.split_once('/').unwrap_or((text, text));
        let mark = Self {
            value: number(value)?,
            mask: number(mask)?,
        };
        if mark.value == 0 {
            return Err("a mark of zero marks nothing: give at least one bit, like 0x1/0x1".into());
        }
        if mark.value & !mark.mask != 0 {
            return Err(format!(
                "value {:#x} has bits outside mask {:#x}",
                mark.value, mark.mask
            ));
        }
        Ok(mark)
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is not a 32-bit number, decimal or 0x…"))
}
