//! The host's interfaces, and notifications of changes to them.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_route::link::{InfoPortKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection};

use crate::wire::side;

/// The interfaces whose packets the programs read, by index.
pub type Interfaces = BTreeMap<u32, Interface>;

/// An interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Ethernet address; none where packets have no link-layer header.
    pub mac: Option<[u8; 6]>,
    /// MTU: the largest packet in bytes, from the network header on.
    pub mtu: u32,
}

/// Lists the interfaces of the calling thread's namespace: all but the loopback, pepsal's own devices, and the ports of
/// bridges and bonds, whose packets pass the controlling interface too.
///
/// # Errors
/// When the kernel refuses to list them.
pub async fn list() -> Result<Interfaces> {
    let links: Vec<_> = connect()?
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("cannot list interfaces")?;
    Ok(links.into_iter().filter_map(interface).collect())
}

fn interface(link: LinkMessage) -> Option<(u32, Interface)> {
    let (mut name, mut mac, mut mtu, mut is_port) = (None, None, 1500, false);
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::Address(address) => mac = <[u8; 6]>::try_from(address).ok(),
            LinkAttribute::Mtu(bytes) => mtu = bytes,
            LinkAttribute::LinkInfo(infos) => {
                is_port |= infos.iter().any(|info| {
                    matches!(
                        info,
                        LinkInfo::PortKind(InfoPortKind::Bridge | InfoPortKind::Bond)
                    )
                });
            }
            _ => {}
        }
    }
    let name = name?;
    let is_loopback = link.header.index == 1;
    if is_loopback || is_port || side::is_host_end(&name) {
        return None;
    }
    let mac = mac.filter(|_| link.header.link_layer_type == LinkLayerType::Ether);
    Some((link.header.index, Interface { name, mac, mtu }))
}

/// Notifies of changes to interfaces, and to the queueing disciplines that filters are attached to.
pub struct Changes {
    messages: Box<dyn futures_util::Stream<Item = ()> + Send + Unpin>,
}

impl Changes {
    /// Subscribes to the notifications of rtnetlink.
    ///
    /// # Errors
    /// When the kernel refuses the subscription.
    pub fn subscribe() -> Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Tc];
        let (connection, _, messages) =
            new_multicast_connection(&groups).context("cannot watch the network")?;
        tokio::spawn(connection);
        Ok(Self {
            messages: Box::new(messages.map(|_| ())),
        })
    }

    /// Waits for the next change.
    pub async fn next(&mut self) {
        if self.messages.next().await.is_none() {
            std::future::pending().await
        }
    }

    /// Drops the notifications that have arrived so far.
    pub fn skip_pending(&mut self) {
        use futures_util::FutureExt;
        while let Some(Some(())) = self.messages.next().now_or_never() {}
    }
}

/// Opens a netlink socket in the calling thread's namespace.
///
/// # Errors
/// When no descriptor is left.
pub fn connect() -> Result<Handle> {
    let (connection, handle, _) = new_connection().context("cannot open a netlink socket")?;
    tokio::spawn(connection);
    Ok(handle)
}
