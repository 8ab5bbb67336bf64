//! Rules of the host's that translate source addresses, asked of nf_tables over netlink.
//!
//! Translation happens after the server leg has sent, and is undone after the TC programs have seen an answer: so they look
//! for a leg with the gateway's address, while the leg has the client's, and the answer is forwarded past it.

use std::{fmt, io};

use netlink_packet_core::{
    NLA_HEADER_SIZE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NlaBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// A chain that translates source addresses, those of some connections at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    family: &'static str,
    table: String,
    name: String,
}

impl fmt::Display for Chain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "chain {} of {} {}", self.name, self.family, self.table)
    }
}

/// The chains of this network namespace with such rules, those of `iptables-nft` among them. Rules of `iptables-legacy` are
/// not nf_tables'.
///
/// # Errors
/// Without `CAP_NET_ADMIN`, or where the kernel has no nf_tables.
pub fn source_nat() -> io::Result<Vec<Chain>> {
    let mut chains: Vec<Chain> = rules()?
        .iter()
        .filter(|rule| rule.translates_source)
        .map(|rule| rule.chain.clone())
        .collect();
    chains.dedup();
    Ok(chains)
}

struct Rule {
    chain: Chain,
    translates_source: bool,
}

// Numbers of uapi/linux/netfilter/nfnetlink.h and nf_tables.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_NAT_TYPE: u16 = 1;
const NFT_NAT_SNAT: [u8; 4] = 0u32.to_be_bytes();
const NFTA_TARGET_NAME: u16 = 1;
/// Length of a message's header, and of nf_tables' own (`struct nfgenmsg`: family, version, resource).
const HEADERS: usize = 16 + 4;

fn rules() -> io::Result<Vec<Rule>> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    let mut request = [0; HEADERS];
    let mut message = NetlinkBuffer::new(&mut request[..]);
    message.set_length(HEADERS as u32);
    message.set_message_type(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE);
    message.set_flags(NLM_F_REQUEST | NLM_F_DUMP);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut rules = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while let Ok(message) = NetlinkBuffer::new_checked(rest) {
            match message.message_type() {
                NLMSG_DONE => return Ok(rules),
                NLMSG_ERROR => return Err(error(message.payload())),
                kind if kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE => {
                    rules.extend(rule(message.payload()));
                }
                _ => {}
            }
            let length = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn error(payload: &[u8]) -> io::Error {
    let number = payload
        .first_chunk()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    io::Error::from_raw_os_error(-number)
}

fn rule(payload: &[u8]) -> Option<Rule> {
    let (header, attributes) = payload.split_first_chunk::<4>()?;
    let family = match header[0] {
        1 => "inet",
        2 => "ip",
        10 => "ip6",
        _ => return None,
    };
    let expressions = attribute(attributes, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    let mut expressions = NlasIterator::new(expressions).map_while(Result::ok);
    Some(Rule {
        chain: Chain {
            family,
            table: text(attribute(attributes, NFTA_RULE_TABLE)?),
            name: text(attribute(attributes, NFTA_RULE_CHAIN)?),
        },
        translates_source: expressions
            .any(|element| element.kind() == NFTA_LIST_ELEM && translates_source(value(element))),
    })
}

/// Whether an expression is `masquerade` or `snat`, or an extension of iptables' of that name.
fn translates_source(expression: &[u8]) -> bool {
    let data = attribute(expression, NFTA_EXPR_DATA).unwrap_or_default();
    match attribute(expression, NFTA_EXPR_NAME).map(text).as_deref() {
        Some("masq") => true,
        Some("nat") => attribute(data, NFTA_NAT_TYPE) == Some(&NFT_NAT_SNAT),
        Some("target") => attribute(data, NFTA_TARGET_NAME)
            .is_some_and(|name| ["MASQUERADE", "SNAT", "NETMAP"].contains(&text(name).as_str())),
        _ => false,
    }
}

fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut attributes = NlasIterator::new(attributes).map_while(Result::ok);
    attributes.find(|attribute| attribute.kind() == kind).map(value)
}

fn value(attribute: NlaBuffer<&[u8]>) -> &[u8] {
    let end = usize::from(attribute.length());
    &attribute.into_inner()[NLA_HEADER_SIZE..end]
}

fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}
