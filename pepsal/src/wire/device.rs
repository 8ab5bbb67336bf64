//! A namespace for the legs of one side, and the device pair that joins it to the host.
//!
//! In the namespace every packet that comes in by the device is delivered, whatever its destination, and every packet that
//! is sent leaves by the device. Nothing else is there: no address, no netfilter, no other route.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
    thread,
};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags,
        LinkInfo, LinkMessage,
    },
    nsid::{NsidAttribute, NsidMessage},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
        RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use nix::{libc, net::if_::if_nametoindex};
use pepsal_ebpf::DEVICE_MAC;
use rtnetlink::Handle;
use tracing::{debug, warn};

use crate::{
    host::namespace::Namespace,
    wire::{interfaces, side::Side},
};

/// The device's end in the namespace.
pub const INNER: &str = "wire0";

/// Names that are tried: one pair for each of so many instances.
const NAMES: u32 = 1000;

/// As large as devices take: routes say how large packets may be.
const DEVICE_MTU: u32 = 65_535;

/// The table of the local route, and the priority of the rule that leads to it.
const LOCAL_TABLE: u32 = 100;
const LOCAL_PRIORITY: u32 = 1;
/// The priority of the rules for interfaces with a packet size of their own, and the number that their indexes are added to
/// for their tables.
const MTU_PRIORITY: u32 = 2;
const MTU_TABLES: u32 = 1000;

/// The neighbour that all packets are sent to. It is never asked for, and keeps the neighbour table at one entry.
const NEIGHBOUR_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const NEIGHBOUR_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// The namespace of one side's legs, and the device pair that joins it to the host. Dropping it removes the pair.
#[derive(Debug)]
pub struct Device {
    /// Whose legs it carries.
    pub side: Side,
    namespace: Namespace,
    inside: Handle,
    /// Interface index of the inner end, in the namespace.
    inner: u32,
    /// Identifier of the namespace (RTM_NEWNSID), relative to the host's namespace.
    pub netns_id: u32,
    /// Name of the host end.
    pub name: String,
    /// Interface index of the host end. A device that is made again gets the same index.
    pub ifindex: u32,
    mtus: Mtus,
}

/// MTUs in bytes, by packet mark: a leg's mark is the index of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mtus {
    of_most: u32,
    of_others: BTreeMap<u32, u32>,
}

impl Mtus {
    /// Returns the MTUs of interfaces, given as index and MTU in bytes. The most frequent MTU needs no rule.
    pub fn of(interfaces: impl Iterator<Item = (u32, u32)>) -> Self {
        let by_index: BTreeMap<u32, u32> = interfaces.collect();
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        by_index
            .values()
            .for_each(|mtu| *counts.entry(*mtu).or_default() += 1);
        let most = counts.into_iter().max_by_key(|(mtu, count)| (*count, *mtu));
        let of_most = most.map_or(1500, |(mtu, _)| mtu);
        let of_others = by_index.into_iter().filter(|(_, mtu)| *mtu != of_most).collect();
        Self { of_most, of_others }
    }
}

impl Device {
    /// Makes the device pair of a side, and the namespace's rules and routes.
    ///
    /// # Errors
    /// When the kernel refuses a device, a rule or a route.
    pub async fn new(side: Side, namespace: Namespace) -> Result<Self> {
        let inside = namespace.netlink()?;
        let mut device = Self {
            side,
            namespace,
            inside,
            inner: 0,
            netns_id: 0,
            name: String::new(),
            ifindex: 0,
            mtus: Mtus::default(),
        };
        set_up(&device.inside, 1).await?;
        device.make().await?;
        device.netns_id = device.identify().await?;
        Ok(device)
    }

    /// Returns the namespace that the inner end is in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Takes the host end up; makes the device again if it was removed. Returns true for a new device, which has no programs
    /// attached.
    ///
    /// # Errors
    /// When the kernel refuses a device, a rule or a route.
    pub async fn restore(&mut self) -> Result<bool> {
        let is_there = if_nametoindex(self.name.as_str()) == Ok(self.ifindex);
        if is_there {
            set_up(&interfaces::connect()?, self.ifindex).await?;
            return Ok(false);
        }
        warn!(device = self.name, "somebody has removed it: making it again");
        self.make().await?;
        let mtus = std::mem::take(&mut self.mtus);
        self.follow(mtus).await?;
        Ok(true)
    }

    /// Returns whether a leg in the namespace waits for the acknowledgement of its FIN.
    pub fn has_unacknowledged_fins(&self) -> bool {
        self.namespace.run(|| {
            ["tcp", "tcp6"].iter().any(|table| {
                let table = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                table.is_ok_and(|table| {
                    table
                        .lines()
                        .filter_map(state)
                        .any(|state| WAITING.contains(&state))
                })
            })
        })
    }

    /// Sets the MTUs that legs go by, open ones included: a route for each MTU, and a rule for each mark that needs one.
    ///
    /// # Errors
    /// When the kernel refuses a rule or a route.
    pub async fn follow(&mut self, mtus: Mtus) -> Result<()> {
        if mtus == self.mtus {
            return Ok(());
        }
        for family in FAMILIES {
            self.route_all(family, MAIN_TABLE, mtus.of_most).await?;
            for (mark, mtu) in &mtus.of_others {
                self.route_all(family, MTU_TABLES + mark, *mtu).await?;
                self.rule(family, MTU_PRIORITY, MTU_TABLES + mark, |request| {
                    request.fw_mark(*mark)
                })
                .await?;
            }
            for mark in self.mtus.of_others.keys() {
                if !mtus.of_others.contains_key(mark) {
                    self.forget_rule(family, *mark).await?;
                }
            }
        }
        self.mtus = mtus;
        Ok(())
    }

    async fn make(&mut self) -> Result<()> {
        let host = interfaces::connect()?;
        match self.ifindex {
            0 => self.add_under_free_name(&host).await?,
            _ => {
                let name = self.name.clone();
                let made = self.add(&host, &name).await;
                made.with_context(|| format!("cannot make device {name} again"))?;
            }
        }
        self.ifindex = if_nametoindex(self.name.as_str()).context("a device has vanished")?;
        let mut message = LinkMessage::default();
        message.header.index = self.ifindex;
        let no_address = vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)];
        message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(no_address)])];
        // A host without IPv6 makes no addresses anyway.
        let _ = host.link().set(message).execute().await;
        let inner = self.namespace.run(|| if_nametoindex(INNER));
        self.inner = inner.context("a device has vanished")?;
        set_up(&self.inside, self.inner).await?;
        set_up(&host, self.ifindex).await?;
        for family in FAMILIES {
            self.route_local(family).await?;
            let input = |request: rtnetlink::RuleAddRequest| request.input_interface(INNER);
            self.rule(family, LOCAL_PRIORITY, LOCAL_TABLE, input).await?;
        }
        Ok(())
    }

    async fn add_under_free_name(&mut self, host: &Handle) -> Result<()> {
        let prefix = self.side.prefix();
        for number in 0..NAMES {
            let name = format!("{prefix}{number}");
            match self.add(host, &name).await {
                Err(error) if is_errno(&error, libc::EEXIST) => {}
                made => {
                    self.name = name;
                    return made.with_context(|| format!("cannot make device {}", self.name));
                }
            }
        }
        bail!(
            "cannot make a device: {prefix}0 to {prefix}{} are there already",
            NAMES - 1
        )
    }

    async fn add(&self, host: &Handle, name: &str) -> Result<(), rtnetlink::Error> {
        let end = |name: &str, index| {
            let mut end = LinkMessage::default();
            end.header.index = index;
            end.header.flags = LinkFlags::Noarp;
            end.header.change_mask = LinkFlags::Noarp;
            end.attributes = vec![
                LinkAttribute::IfName(name.to_owned()),
                LinkAttribute::Address(DEVICE_MAC.to_vec()),
                LinkAttribute::Mtu(DEVICE_MTU),
            ];
            end
        };
        let mut inner = end(INNER, 0);
        let namespace = self.namespace.as_fd().as_raw_fd();
        inner.attributes.push(LinkAttribute::NetNsFd(namespace));
        let mut message = end(name, self.ifindex);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inner))),
        ]));
        host.link().add(message).execute().await
    }

    /// Gives the namespace an identifier, unless the kernel has done so already, and returns it.
    async fn identify(&self) -> Result<u32> {
        let mut host = interfaces::connect()?;
        let descriptor = NsidAttribute::Fd(self.namespace.as_fd().as_raw_fd() as u32);
        let mut wanted = NsidMessage::default();
        wanted.attributes = vec![descriptor.clone(), NsidAttribute::Id(-1)];
        // The kernel refuses where there is one already.
        let _ = answer(&mut host, RouteNetlinkMessage::NewNsId(wanted), NLM_F_ACK).await;
        let mut question = NsidMessage::default();
        question.attributes = vec![descriptor];
        let answer = answer(&mut host, RouteNetlinkMessage::GetNsId(question), 0).await?;
        match answer {
            Some(RouteNetlinkMessage::NewNsId(message)) => {
                let id = message.attributes.iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(id) => u32::try_from(*id).ok(),
                    _ => None,
                });
                id.context("a namespace has no identifier")
            }
            other => bail!("cannot identify a namespace: {other:?}"),
        }
    }

    async fn route_local(&self, family: AddressFamily) -> Result<()> {
        let mut route = route(family, LOCAL_TABLE);
        route.header.kind = RouteType::Local;
        route.header.scope = RouteScope::Host;
        // The loopback is the first interface of every namespace.
        route.attributes.push(RouteAttribute::Oif(1));
        self.install(family, route).await
    }

    async fn route_all(&self, family: AddressFamily, table: u32, mtu: u32) -> Result<()> {
        let mut route = route(family, table);
        route.header.kind = RouteType::Unicast;
        route.header.flags = RouteFlags::Onlink;
        let neighbour = match family {
            AddressFamily::Inet => RouteAddress::Inet(NEIGHBOUR_V4),
            _ => RouteAddress::Inet6(NEIGHBOUR_V6),
        };
        route.attributes.extend([
            RouteAttribute::Oif(self.inner),
            RouteAttribute::Gateway(neighbour),
            RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]),
        ]);
        self.install(family, route).await
    }

    async fn install(&self, family: AddressFamily, route: RouteMessage) -> Result<()> {
        match self.inside.route().add(route).replace().execute().await {
            // The kernel has no IPv6.
            Err(error) if family == AddressFamily::Inet6 && is_absent(&error) => Ok(()),
            added => added.context("cannot add a route to the legs' namespace"),
        }
    }

    async fn rule(
        &self,
        family: AddressFamily,
        priority: u32,
        table: u32,
        select: impl Fn(rtnetlink::RuleAddRequest) -> rtnetlink::RuleAddRequest,
    ) -> Result<()> {
        let request = self.inside.rule().add().table_id(table).priority(priority);
        let mut request = select(request.action(RuleAction::ToTable));
        request.message_mut().header.family = family;
        match request.execute().await {
            Err(error) if is_errno(&error, libc::EEXIST) => Ok(()),
            Err(error) if family == AddressFamily::Inet6 && is_absent(&error) => Ok(()),
            added => added.context("cannot add a rule to the legs' namespace"),
        }
    }

    async fn forget_rule(&self, family: AddressFamily, mark: u32) -> Result<()> {
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::Priority(MTU_PRIORITY),
            RuleAttribute::FwMark(mark),
            RuleAttribute::Table(MTU_TABLES + mark),
        ];
        match self.inside.rule().del(rule).execute().await {
            Err(error) if is_errno(&error, libc::ENOENT) || is_absent(&error) => Ok(()),
            removed => removed.context("cannot remove a rule of the legs' namespace"),
        }
    }
}

impl Drop for Device {
    /// On a thread and a runtime of its own: the one that drops this may be on its way out.
    fn drop(&mut self) {
        if thread::panicking() {
            // Legs are still open, whose resets need it: it ends with its namespace.
            return;
        }
        let ifindex = self.ifindex;
        let removed = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                interfaces::connect()?
                    .link()
                    .del(ifindex)
                    .execute()
                    .await
                    .map_err(Into::into)
            })
        });
        // It would end with its namespace all the same, a moment later.
        if let Ok(Err(error)) = removed.join() as thread::Result<Result<()>> {
            debug!(device = self.name, "cannot remove a device: {error:#}");
        }
    }
}

/// FIN_WAIT1, LAST_ACK and CLOSING of the kernel's `net/tcp_states.h`.
const WAITING: [&str; 3] = ["04", "09", "0B"];

/// The state in a line of `/proc/net/tcp` (proc_net(5)).
fn state(line: &str) -> Option<&str> {
    line.split_whitespace().nth(3)
}

/// `RT_TABLE_MAIN`.
const MAIN_TABLE: u32 = 254;

fn route(family: AddressFamily, table: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family;
    route.header.protocol = RouteProtocol::Static;
    route.header.table = u8::try_from(table).unwrap_or(0);
    route.attributes.push(RouteAttribute::Table(table));
    route
}

async fn set_up(handle: &Handle, ifindex: u32) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    handle
        .link()
        .set(message)
        .execute()
        .await
        .context("cannot take a device up")
}

/// Sends a request and returns what the kernel answers, if it is more than an acknowledgement.
async fn answer(
    handle: &mut Handle,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<Option<RouteNetlinkMessage>> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | flags;
    let mut answers = handle.request(request)?;
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => return Ok(Some(message)),
            NetlinkPayload::Error(error) => return Err(error.to_io().into()),
            _ => {}
        }
    }
    Ok(None)
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    [libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EACCES]
        .iter()
        .any(|errno| is_errno(error, *errno))
}

fn is_errno(error: &rtnetlink::Error, errno: i32) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error() == Some(errno),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_with_the_usual_packet_size_need_no_rule() {
        let mtus = Mtus::of([(2, 1500), (3, 9000), (4, 1500)].into_iter());
        assert_eq!(mtus.of_most, 1500);
        assert_eq!(mtus.of_others, BTreeMap::from([(3, 9000)]));
        assert_eq!(Mtus::of([].into_iter()).of_most, 1500);
        assert_eq!(Mtus::of([(2, 1280), (3, 9000)].into_iter()).of_most, 9000);
    }
}
