//! Follows changes of the host's interfaces.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, bail};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::{
    daemon::proxy::Proxy,
    flow::Shared,
    wire::{
        device::{Device, Mtus},
        interfaces::{self, Interfaces},
    },
};

impl Proxy {
    /// Restores removed devices and programs, and follows added, removed and changed interfaces.
    pub async fn adapt(&mut self) {
        // Changes arrive in bursts, and this function causes some itself.
        sleep(Duration::from_millis(20)).await;
        self.changes.skip_pending();
        let before: Vec<String> = self.attachments.intercepting().map(str::to_owned).collect();
        if let Err(error) = self.try_adapt().await {
            warn!("cannot follow a change of the network: {error:#}");
        }
        let after: Vec<String> = self.attachments.intercepting().map(str::to_owned).collect();
        if before != after {
            info!(
                before = before.join(","),
                now = after.join(","),
                "intercepted interfaces changed"
            );
        }
    }

    async fn try_adapt(&mut self) -> Result<()> {
        for device in [&mut self.clients, &mut self.servers] {
            let is_new = device.restore().await?;
            if is_new || !self.attachments.is_device_intact(&mut self.programs, device) {
                self.attachments.attach_device(&mut self.programs, device)?;
            }
        }
        self.follow(&interfaces::list().await?).await
    }

    /// Applies the present interfaces to the MTUs of legs and devices, the kernel's map of interfaces, and
    /// the attachments.
    pub(super) async fn follow(&mut self, interfaces: &Interfaces) -> Result<()> {
        follow_mtus(interfaces, &self.shared, &mut self.clients, &mut self.servers).await?;
        let intercepted = &self.intercepted;
        let wanted = |name: &str| intercepted.iter().any(|wanted| wanted == name);
        self.programs.describe(interfaces, wanted, &self.shared.links)?;
        let followed = self.attachments.follow(&mut self.programs, interfaces, wanted);
        self.observatory.view.attached.set(self.attachments.list());
        followed
    }
}

/// Checks that the interfaces to intercept are present.
///
/// # Errors
/// For an interface that is missing; the message names those that are present.
pub fn check_interfaces(wanted: &[String], present: &Interfaces) -> Result<()> {
    for name in wanted {
        if !present.values().any(|interface| interface.name == *name) {
            let names: Vec<&str> = present
                .values()
                .map(|interface| interface.name.as_str())
                .collect();
            bail!(
                "interface {name}: no such interface that can be intercepted; present are {}",
                names.join(", ")
            );
        }
    }
    Ok(())
}

/// Applies the MTUs of the interfaces to legs and devices.
async fn follow_mtus(
    interfaces: &Interfaces,
    shared: &Shared,
    clients: &mut Device,
    servers: &mut Device,
) -> Result<()> {
    let mtus = || {
        interfaces
            .iter()
            .map(|(index, interface)| (*index, interface.mtu))
    };
    shared.interfaces.store(Arc::new(interfaces.clone()));
    clients.follow(Mtus::of(mtus())).await?;
    servers.follow(Mtus::of(mtus())).await
}
