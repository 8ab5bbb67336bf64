//! The host: the daemon's own network namespaces, and kernel settings.

pub mod namespace;
pub mod sysctls;
