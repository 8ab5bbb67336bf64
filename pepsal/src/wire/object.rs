//! The eBPF object that the build embedded, and the names of the programs in it.

use anyhow::{Result, anyhow};
use aya::{Ebpf, maps::Map, programs::ProgramError};
use tracing::debug;

/// The object, empty when the build had none.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pepsal.bpf.o"));

/// Ingress of intercepted interfaces.
pub const STEER: &str = "pepsal_steer";
/// Egress of all interfaces.
pub const REPLIES: &str = "pepsal_replies";
/// Host ends of the devices, ingress.
pub const CLIENTS_OUT: &str = "pepsal_clients_out";
pub const SERVERS_OUT: &str = "pepsal_servers_out";
/// Inner ends, egress.
pub const LABEL: &str = "pepsal_label";

/// The programs that are attached to interfaces and devices.
pub const TC_PROGRAMS: [&str; 5] = [STEER, REPLIES, CLIENTS_OUT, SERVERS_OUT, LABEL];

/// Socket lookup of the clients' namespace.
pub const LISTENER: &str = "pepsal_listener";
/// Socket options of the daemon's control group.
pub const WINDOW: &str = "pepsal_window";

/// Returns a program of a loaded object.
pub fn program<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("the eBPF object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// Takes a map out of a loaded object.
pub fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name)
        .ok_or_else(|| anyhow!("the eBPF object has no map {name}"))
}

/// One line for the user; the verifier's many go to the log.
pub fn refused(name: &str, error: ProgramError) -> anyhow::Error {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            debug!("{verifier_log}");
            anyhow!("the kernel refuses the eBPF program {name}: {io_error} (-v shows the verifier's log)")
        }
        other => anyhow!("the kernel refuses the eBPF program {name}: {other}"),
    }
}
