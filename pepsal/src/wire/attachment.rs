//! Where the programs are attached: to the host's interfaces, which come and go, and to the devices.

use std::{cell::LazyCell, collections::BTreeMap, io, mem, thread};

use anyhow::{Context, Result};
use aya::{
    programs::{
        LinkOrder, ProgramError, ProgramId, SchedClassifier, TcAttachType,
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact, qdisc_detach_program},
    },
    sys::SyscallError,
};
use nix::net::if_::if_nametoindex;
use tracing::{debug, info, warn};

use crate::wire::{
    claims,
    device::{Device, INNER},
    hook,
    interfaces::Interfaces,
    object::{CLIENTS_OUT, LABEL, REPLIES, SERVERS_OUT, STEER, program},
    programs::Programs,
    side::Side,
};

/// A hook of an interface, and the program on it.
#[derive(Debug, Clone, Copy)]
enum Hook {
    Steer,
    Replies,
    ClientsOut,
    ServersOut,
    Label,
}

impl Hook {
    /// The host end of a side's device.
    fn of_device(side: Side) -> Self {
        match side {
            Side::Clients => Self::ClientsOut,
            Side::Servers => Self::ServersOut,
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Steer => STEER,
            Self::Replies => REPLIES,
            Self::ClientsOut => CLIENTS_OUT,
            Self::ServersOut => SERVERS_OUT,
            Self::Label => LABEL,
        }
    }

    fn direction(self) -> TcAttachType {
        match self {
            Self::Steer | Self::ClientsOut | Self::ServersOut => TcAttachType::Ingress,
            Self::Replies | Self::Label => TcAttachType::Egress,
        }
    }
}

/// The attached programs. Dropping it detaches them; tcx links also end with the process.
pub struct Attachments {
    devices: [Option<DeviceLinks>; 2],
    interfaces: BTreeMap<u32, Attachment>,
    tcx_refused: bool,
    beside_another: bool,
    claims: claims::Directory,
}

struct DeviceLinks {
    _host: SchedClassifierLink,
    _inner: SchedClassifierLink,
}

struct Attachment {
    name: String,
    intercepts: bool,
    /// Kept when the interface is not intercepted any more: flows that came in by it still do.
    steer: Option<SchedClassifierLink>,
    _replies: SchedClassifierLink,
}

/// An interface that programs are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Name of the interface.
    pub interface: String,
    /// Whether new connections are intercepted there. Packets for server legs are found on every interface.
    pub intercepts: bool,
    /// Whether the programs are attached by tcx links, which end with the process, or else as filters of the clsact qdisc.
    pub is_tcx: bool,
}

impl Attachments {
    /// Returns a list without attachments. With `beside_another`, programs of another instance are attached and stay.
    /// `claims` is the directory in which running instances are found.
    pub fn new(beside_another: bool, claims: claims::Directory) -> Self {
        Self {
            devices: [None, None],
            interfaces: BTreeMap::new(),
            tcx_refused: false,
            beside_another,
            claims,
        }
    }

    /// Attaches programs to both ends of a device.
    ///
    /// # Errors
    /// When the kernel refuses an attachment.
    pub fn attach_device(&mut self, programs: &mut Programs, device: &Device) -> Result<()> {
        let hook = Hook::of_device(device.side);
        // A program is on a hook once.
        self.devices[device.side as usize] = None;
        let links = DeviceLinks {
            _host: self.attach(programs, &device.name, hook)?,
            _inner: device
                .namespace()
                .run(|| self.attach(programs, INNER, Hook::Label))?,
        };
        self.devices[device.side as usize] = Some(links);
        Ok(())
    }

    /// Attaches programs to new interfaces, and where one was detached; forgets interfaces that are gone. `intercepts`
    /// returns whether new connections are intercepted on the interface of a name.
    ///
    /// # Errors
    /// When the kernel refuses an attachment to an interface that intercepts.
    pub fn follow(
        &mut self,
        programs: &mut Programs,
        interfaces: &Interfaces,
        intercepts: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let tcx = !self.tcx_refused;
        self.interfaces.retain(|index, attachment| {
            interfaces.get(index).is_some_and(|interface| {
                let is_intact = !tcx || attachment.is_intact(&interface.name, programs);
                is_intact && (attachment.steer.is_some() || !intercepts(&interface.name))
            })
        });
        let claims = self.claims.clone();
        let is_alone = LazyCell::new(|| claims.is_alone());
        for (index, interface) in interfaces {
            let (name, intercepts) = (&interface.name, intercepts(&interface.name));
            if let Some(attachment) = self.interfaces.get_mut(index) {
                attachment.name.clone_from(name);
                attachment.intercepts = intercepts;
                continue;
            }
            if !self.beside_another && *is_alone {
                purge(name);
            }
            match self.attach_interface(programs, name, intercepts) {
                Ok(attachment) => {
                    debug!(interface = name, intercepts, "attached");
                    self.interfaces.insert(*index, attachment);
                }
                // Gone again: there will be news of it.
                Err(_) if if_nametoindex(name.as_str()).is_err() => {}
                Err(error) if intercepts => return Err(error),
                Err(error) => warn!(
                    interface = name,
                    "packets for server legs are not recognised on it: {error:#}"
                ),
            }
        }
        Ok(())
    }

    fn attach_interface(
        &mut self,
        programs: &mut Programs,
        name: &str,
        intercepts: bool,
    ) -> Result<Attachment> {
        let replies = self.attach(programs, name, Hook::Replies)?;
        let steer = intercepts
            .then(|| self.attach(programs, name, Hook::Steer))
            .transpose()?;
        Ok(Attachment {
            name: name.to_owned(),
            intercepts,
            steer,
            _replies: replies,
        })
    }

    /// Ends the time in which another instance's programs are on the same hooks and new connections are not ours alone.
    pub fn taken_over(&mut self) {
        self.beside_another = false;
    }

    /// Attaches before other programs, so that those see what goes on to the host, and what leaves for the client, once each;
    /// but after those of an instance that this one takes over from, whose flows are still that one's.
    fn attach(
        &mut self,
        programs: &mut Programs,
        interface: &str,
        hook: Hook,
    ) -> Result<SchedClassifierLink> {
        let program: &mut SchedClassifier = program(&mut programs.ebpf, hook.program())?;
        let before = match hook {
            Hook::Steer | Hook::Replies if self.beside_another => first_of(interface, hook),
            _ => None,
        };
        let order = before.map_or(LinkOrder::first(), LinkOrder::after_program_id);
        let options = TcAttachOptions::TcxOrder(order);
        let link = match program.attach_with_options(interface, hook.direction(), options) {
            // Before Linux 6.6, or built without CONFIG_NET_XGRESS.
            Err(ProgramError::SyscallError(SyscallError { io_error, .. })) if is_unknown(&io_error) => {
                if !self.tcx_refused {
                    self.tcx_refused = true;
                    info!("this kernel has no tcx: attaching to the clsact qdisc");
                }
                // It may be there already, and is not ours to remove.
                let _ = qdisc_add_clsact(interface);
                let options = TcAttachOptions::Netlink(NlOptions::default());
                program.attach_with_options(interface, hook.direction(), options)
            }
            other => other,
        };
        let link = link.with_context(|| format!("cannot attach to interface {interface}"))?;
        Ok(program.take_link(link)?)
    }

    /// Returns the names of the interfaces whose new connections are intercepted.
    pub fn intercepting(&self) -> impl Iterator<Item = &str> {
        self.interfaces
            .values()
            .filter(|attachment| attachment.intercepts)
            .map(|attachment| attachment.name.as_str())
    }

    /// Returns the interfaces that programs are attached to.
    pub fn list(&self) -> Vec<Attached> {
        let attached = self.interfaces.values().map(|attachment| Attached {
            interface: attachment.name.clone(),
            intercepts: attachment.intercepts,
            is_tcx: !self.tcx_refused,
        });
        attached.collect()
    }

    /// Returns false when a program was detached since; always true without tcx, where that is unknown.
    pub fn are_intact(&self, programs: &mut Programs, devices: [&Device; 2]) -> bool {
        self.tcx_refused
            || devices
                .iter()
                .all(|device| self.is_device_intact(programs, device))
                && self
                    .interfaces
                    .values()
                    .all(|attachment| attachment.is_intact(&attachment.name, programs))
    }

    /// Returns false when a program was detached from a device since.
    pub fn is_device_intact(&self, programs: &mut Programs, device: &Device) -> bool {
        let hook = Hook::of_device(device.side);
        self.tcx_refused
            || is_attached(programs, &device.name, hook)
                && device
                    .namespace()
                    .run(|| is_attached(programs, INNER, Hook::Label))
    }
}

impl Drop for Attachments {
    fn drop(&mut self) {
        if thread::panicking() {
            // Legs are still open, whose resets need them: links end with the process.
            mem::forget((mem::take(&mut self.devices), mem::take(&mut self.interfaces)));
        }
    }
}

impl Attachment {
    fn is_intact(&self, interface: &str, programs: &mut Programs) -> bool {
        is_attached(programs, interface, Hook::Replies)
            && (self.steer.is_none() || is_attached(programs, interface, Hook::Steer))
    }
}

/// The program that comes first on a hook: that of the instance before, as it was attached.
fn first_of(interface: &str, hook: Hook) -> Option<ProgramId> {
    let id = *hook::programs(interface, hook.direction()).ok()?.first()?;
    // SAFETY: the identifier of a program that is attached; one that is gone by now is refused.
    Some(unsafe { ProgramId::new(id) })
}

/// Whether a program is on its hook; where that cannot be told it is.
fn is_attached(programs: &mut Programs, interface: &str, hook: Hook) -> bool {
    let program: Result<&mut SchedClassifier> = program(&mut programs.ebpf, hook.program());
    let Some(info) = program.ok().and_then(|program| program.info().ok()) else {
        return true;
    };
    hook::programs(interface, hook.direction()).map_or(true, |attached| attached.contains(&info.id()))
}

/// Attached filters outlive a killed process on kernels without tcx; whose they are does not show. None found, or no qdisc,
/// is as good.
fn purge(interface: &str) {
    for hook in [Hook::Steer, Hook::Replies] {
        while qdisc_detach_program(interface, hook.direction(), hook.program()).is_ok() {
            info!(interface, "removed a filter that an earlier instance left behind");
        }
    }
}

fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EINVAL | nix::libc::EOPNOTSUPP)
    )
}
