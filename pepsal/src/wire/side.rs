//! The two sides of the wire, and the names of their devices.

/// Whose legs a device carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Client legs.
    Clients,
    /// Server legs.
    Servers,
}

impl Side {
    const BOTH: [Self; 2] = [Self::Clients, Self::Servers];

    /// Returns what the names of its devices' host ends begin with.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Clients => "pepsal-c",
            Self::Servers => "pepsal-s",
        }
    }
}

/// Returns whether an interface of this name is the host end of a device, of this instance or another.
pub fn is_host_end(name: &str) -> bool {
    Side::BOTH.iter().any(|side| {
        let number = name.strip_prefix(side.prefix());
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    })
}
