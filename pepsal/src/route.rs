//! The policy rules and local routes that deliver marked packets here, kept in place while pepsal runs.
//!
//! For every interface and both families: `ip rule fwmark M/M iif DEV lookup T`, and once for each family
//! `ip route local default dev lo table T`. The rules name their interface, so that they do not change how the host's
//! own marked packets are routed (`src_valid_mark`, `tcp_fwmark_accept`).

use std::{
    collections::{BTreeMap, BTreeSet},
    io, thread,
};

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_route::{
    AddressFamily,
    link::{InfoPortKind, LinkAttribute, LinkInfo},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{Handle, IpVersion, MulticastGroup, new_connection, new_multicast_connection};
use tracing::{debug, info, warn};

use crate::{cli::Mark, instance};

/// `FRA_PROTOCOL` and `rtm_protocol` of what pepsal adds, so that it knows its own: `p`, in the range left to users.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(b'p');

/// Before the main table (32766), before VPNs' rules, and before VRFs' (1000).
const PRIORITY: u32 = 90;

const FAMILIES: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

/// The interfaces that packets of flows can arrive on, by index.
pub type Interfaces = BTreeMap<u32, String>;

/// What is added to the routing policy; it is taken away again when this is dropped, unless it is another's by then.
#[derive(Debug)]
pub struct Routes {
    policy: Policy,
    handed_over: bool,
}

#[derive(Debug, Clone, Copy)]
struct Policy {
    mark: Mark,
    table: u32,
}

impl Routes {
    /// Removes what instances that are gone have left behind. Nothing is added yet: that is [`Routes::reconcile`].
    ///
    /// # Errors
    /// When the kernel refuses to list or remove.
    pub async fn new(mark: Mark, table: u32) -> Result<Self> {
        let handle = connect()?;
        for family in FAMILIES {
            let mut abandoned = BTreeSet::new();
            for rule in rules(&handle, &family).await? {
                let Some(of) = rule_table(&rule).filter(|_| is_ours(&rule)) else {
                    continue;
                };
                if of == table || !instance::runs_table(of) {
                    info!(table = of, "removing a rule that an earlier instance left behind");
                    delete_rule(&handle, rule).await?;
                    abandoned.insert(of);
                }
            }
            for table in abandoned {
                Policy { mark, table }.remove_route(&handle, &family).await?;
            }
        }
        Ok(Self::beside(mark, table))
    }

    /// Removes nothing: what is there belongs to an instance that this one follows, and has to stay.
    pub fn beside(mark: Mark, table: u32) -> Self {
        Self {
            policy: Policy { mark, table },
            handed_over: false,
        }
    }

    /// Leaves everything to the instance that follows.
    pub fn hand_over(&mut self) {
        self.handed_over = true;
    }

    /// Adds what is missing: a rule for each of the interfaces and the local routes. Returns how many it had to add.
    ///
    /// # Errors
    /// When the kernel refuses. A family that it does not have is left out.
    pub async fn reconcile(&self, interfaces: &Interfaces) -> Result<usize> {
        self.policy.reconcile(interfaces).await
    }
}

impl Policy {
    async fn reconcile(self, interfaces: &Interfaces) -> Result<usize> {
        let handle = connect()?;
        let mut added = 0;
        for family in FAMILIES {
            let Ok(present) = rules(&handle, &family).await else {
                debug!(?family, "this kernel has no policy rules for the family");
                continue;
            };
            let mut stale: Vec<RuleMessage> = present
                .into_iter()
                .filter(|rule| is_ours(rule) && rule_table(rule) == Some(self.table))
                .collect();
            for name in interfaces.values() {
                let wanted = |rule: &RuleMessage| {
                    rule.attributes.contains(&RuleAttribute::Iifname(name.clone()))
                        && rule.attributes.contains(&RuleAttribute::FwMark(self.mark.value))
                        && rule.attributes.contains(&RuleAttribute::FwMask(self.mark.mask))
                };
                match stale.iter().position(wanted) {
                    Some(present) => drop(stale.swap_remove(present)),
                    None => added += self.add_rule(&handle, &family, name).await?,
                }
            }
            for rule in stale {
                delete_rule(&handle, rule).await?;
            }
            added += self.add_route(&handle, &family).await?;
        }
        Ok(added)
    }

    async fn add_rule(self, handle: &Handle, family: &IpVersion, interface: &str) -> Result<usize> {
        let mut request = handle
            .rule()
            .add()
            .input_interface(interface)
            .table_id(self.table)
            .priority(PRIORITY)
            .fw_mark(self.mark.value)
            .action(RuleAction::ToTable);
        let message = request.message_mut();
        message.header.family = address_family(family);
        message.attributes.push(RuleAttribute::FwMask(self.mark.mask));
        message.attributes.push(RuleAttribute::Protocol(PROTOCOL));
        match request.execute().await {
            Ok(()) => Ok(1),
            Err(error) if is_errno(&error, nix::libc::EEXIST) => Ok(0),
            Err(error) => {
                Err(error).with_context(|| format!("cannot add a policy rule for interface {interface}"))
            }
        }
    }

    async fn add_route(self, handle: &Handle, family: &IpVersion) -> Result<usize> {
        match handle.route().add(self.route(family)).execute().await {
            Ok(()) => Ok(1),
            Err(error) if is_errno(&error, nix::libc::EEXIST) => Ok(0),
            // "IPv6 is disabled on this device": there is nothing to deliver then.
            Err(error) if *family == IpVersion::V6 && is_errno(&error, nix::libc::EACCES) => Ok(0),
            Err(error) => {
                Err(error).with_context(|| format!("cannot add the local route to table {}", self.table))
            }
        }
    }

    fn route(self, family: &IpVersion) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = address_family(family);
        route.header.protocol = PROTOCOL;
        route.header.scope = RouteScope::Host;
        route.header.kind = RouteType::Local;
        route.header.table = u8::try_from(self.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        route.attributes.push(RouteAttribute::Table(self.table));
        // The loopback interface is the first of every network namespace.
        route.attributes.push(RouteAttribute::Oif(1));
        route
    }

    async fn remove(self) -> Result<()> {
        let handle = connect()?;
        for family in FAMILIES {
            let Ok(present) = rules(&handle, &family).await else {
                continue;
            };
            for rule in present {
                if is_ours(&rule) && rule_table(&rule) == Some(self.table) {
                    delete_rule(&handle, rule).await?;
                }
            }
            self.remove_route(&handle, &family).await?;
        }
        Ok(())
    }

    async fn remove_route(self, handle: &Handle, family: &IpVersion) -> Result<()> {
        match handle.route().del(self.route(family)).execute().await {
            Ok(()) => Ok(()),
            Err(error) if is_errno(&error, nix::libc::ESRCH) => Ok(()),
            Err(error) => Err(error).context("cannot remove the local route"),
        }
    }
}

impl Drop for Routes {
    /// On a thread and a runtime of its own: the one that drops this may be on its way out.
    fn drop(&mut self) {
        if self.handed_over {
            return;
        }
        let policy = self.policy;
        let removed = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(policy.remove())
        })
        .join();
        let error = match removed {
            Ok(Ok(())) => return debug!(table = policy.table, "policy rules and local routes removed"),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "panicked".into(),
        };
        warn!(table = policy.table, error, "policy rules may be left behind");
    }
}

/// Every interface that packets of flows can arrive on: all but the loopback and the ports of bridges and bonds, whose
/// packets arrive on the controlling interface too.
///
/// # Errors
/// When the kernel refuses to list them.
pub async fn interfaces() -> Result<Interfaces> {
    let links: Vec<_> = connect()?
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("cannot list interfaces")?;
    let mut interfaces = Interfaces::new();
    for link in links {
        let mut name = None;
        let mut port = false;
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = Some(text),
                LinkAttribute::LinkInfo(infos) => {
                    port |= infos.iter().any(|info| {
                        matches!(
                            info,
                            LinkInfo::PortKind(InfoPortKind::Bridge | InfoPortKind::Bond)
                        )
                    });
                }
                _ => {}
            }
        }
        match name {
            Some(name) if link.header.index != 1 && !port => drop(interfaces.insert(link.header.index, name)),
            _ => {}
        }
    }
    Ok(interfaces)
}

/// Tells of changes to interfaces, rules and routes, whoever makes them.
pub struct Changes {
    messages: Box<dyn futures_util::Stream<Item = ()> + Send + Unpin>,
}

impl Changes {
    /// Subscribes.
    ///
    /// # Errors
    /// When the kernel refuses the subscription.
    pub fn subscribe() -> Result<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
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

    /// Takes note of every change that has been told so far.
    pub fn skip_pending(&mut self) {
        use futures_util::FutureExt;
        while let Some(Some(())) = self.messages.next().now_or_never() {}
    }
}

fn connect() -> Result<Handle> {
    let (connection, handle, _) = new_connection().context("cannot open a netlink socket")?;
    tokio::spawn(connection);
    Ok(handle)
}

async fn rules(handle: &Handle, family: &IpVersion) -> Result<Vec<RuleMessage>> {
    handle
        .rule()
        .get(family.clone())
        .execute()
        .try_collect()
        .await
        .context("cannot list policy rules")
}

async fn delete_rule(handle: &Handle, rule: RuleMessage) -> Result<()> {
    match handle.rule().del(rule).execute().await {
        Ok(()) => Ok(()),
        Err(error) if is_errno(&error, nix::libc::ENOENT) => Ok(()),
        Err(error) => Err(error).context("cannot remove a policy rule"),
    }
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(PROTOCOL))
}

fn rule_table(rule: &RuleMessage) -> Option<u32> {
    let long = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    long.or((rule.header.table != 0).then_some(rule.header.table.into()))
}

fn address_family(family: &IpVersion) -> AddressFamily {
    match family {
        IpVersion::V4 => AddressFamily::Inet,
        IpVersion::V6 => AddressFamily::Inet6,
    }
}

fn is_errno(error: &rtnetlink::Error, errno: i32) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            io::Error::from_raw_os_error(errno).raw_os_error() == message.to_io().raw_os_error()
        }
        _ => false,
    }
}
