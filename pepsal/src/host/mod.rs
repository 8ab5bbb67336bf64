//! The host that the daemon runs on, and the namespaces that it makes for itself there.

pub mod namespace;
pub mod sysctls;
