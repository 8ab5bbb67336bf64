//! The host: the daemon's own network namespaces, kernel settings, and bpf(2).

pub(crate) mod bpf;
pub mod namespace;
pub mod sysctls;
