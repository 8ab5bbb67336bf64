//! Features and settings of the host's kernel: requirements, namespaces, sysctls, control groups, bpf(2).

pub(crate) mod bpf;
pub(crate) mod btf;
pub mod cgroup;
pub(crate) mod clock;
pub(crate) mod descriptors;
pub(crate) mod namespace;
pub mod requirements;
pub(crate) mod sysctls;
