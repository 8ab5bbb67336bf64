//! What this host's kernel offers, and what is set there: requirements, namespaces, kernel settings, control groups, bpf(2).

pub mod bpf;
pub mod btf;
pub mod cgroup;
pub mod clock;
pub mod descriptors;
pub mod namespace;
pub mod requirements;
pub mod sysctls;
