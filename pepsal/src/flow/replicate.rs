//! Copies header fields of the client's SYN to the server leg's.

use clap::ValueEnum;
use pepsal_ebpf::SynRecord;
use socket2::Socket;

use crate::{
    flow::metrics::{Event, Metrics},
    tcp::options::{self, tried},
};

/// Source address of server legs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// The client's address and port
    Client,
    /// The gateway's address and a port of its own
    Gateway,
}

/// Header fields of the client's SYN that can be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Replicate {
    /// The differentiated services code point (RFC 2474), on both legs
    Dscp,
    /// IPv4 options without source routes; IPv6 hop-by-hop and destination options
    Options,
    /// IPv4 source routes too, with the other options; the kernel accepts a source route only from its
    /// beginning
    SourceRoute,
    /// The TTL or hop limit, less one
    Ttl,
    /// Nothing
    None,
}

/// Header fields that are set on the server leg's socket.
#[derive(Debug, Clone)]
pub struct Replication {
    /// Copy the DSCP, to the client leg too.
    pub dscp: bool,
    options: bool,
    source_route: bool,
    ttl: bool,
    /// Whether server legs are sockets of the host, whose packets are not forwarded.
    is_of_host: bool,
}

impl Replication {
    /// Returns the fields of `parts`, for server legs with the address of `source`.
    pub fn new(parts: &[Replicate], source: Source) -> Self {
        let replicates = |part| parts.contains(&part);
        Self {
            dscp: replicates(Replicate::Dscp),
            options: replicates(Replicate::Options) || replicates(Replicate::SourceRoute),
            source_route: replicates(Replicate::SourceRoute),
            ttl: replicates(Replicate::Ttl),
            is_of_host: source == Source::Gateway,
        }
    }

    /// Sets the fields on a socket before its connect, so that the SYN carries them.
    pub fn apply(&self, socket: &Socket, ipv6: bool, record: &SynRecord, metrics: &Metrics) {
        if self.dscp && record.traffic_class != 0 {
            tried(
                "traffic class",
                options::set_traffic_class(socket, ipv6, record.traffic_class),
            );
        }
        if self.ttl {
            // The host forwards the leg's packets, which decrements the TTL.
            let hops = record.ttl - u8::from(self.is_of_host);
            tried("time to live", options::set_ttl(socket, ipv6, hops));
        }
        if !self.options {
            return;
        }
        let mut replicated = record.truncated == 0;
        let ip_options = replicable_options(record.ip_options(), self.source_route);
        if !ip_options.is_empty() && !tried("IP options", options::set_ip_options(socket, &ip_options)) {
            replicated = false;
            // The kernel accepts a source route only from its beginning; without it, the other options are
            // set alone.
            let others = replicable_options(&ip_options, false);
            if others != ip_options && !others.is_empty() {
                tried(
                    "IP options but source routes",
                    options::set_ip_options(socket, &others),
                );
            }
        }
        if let Some(header) = settable_header(record.hop_by_hop()) {
            replicated &= tried("hop-by-hop options", options::set_hop_by_hop(socket, &header));
        }
        if let Some(header) = settable_header(record.destination()) {
            replicated &= tried(
                "destination options",
                options::set_destination_options(socket, &header),
            );
        }
        if !replicated {
            metrics.count(Event::OptionsNotReplicated);
        }
    }
}

/// `IPOPT_END`, `IPOPT_NOOP`, `IPOPT_LSRR` and `IPOPT_SSRR` of RFC 791.
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

/// Returns the IPv4 options to copy, padded to whole words. The list ends at a malformed option.
fn replicable_options(options: &[u8], source_route: bool) -> Vec<u8> {
    let mut kept = Vec::with_capacity(options.len());
    let mut rest = options;
    while let [kind, after @ ..] = rest {
        let len = match (*kind, after.first()) {
            (OPTION_END, _) => break,
            (OPTION_NOP, _) => 1,
            (_, Some(len)) if *len >= 2 && usize::from(*len) <= rest.len() => usize::from(*len),
            _ => break,
        };
        let (option, next) = rest.split_at(len);
        if source_route || !matches!(*kind, LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE) {
            kept.extend_from_slice(option);
        }
        rest = next;
    }
    kept.resize(kept.len().next_multiple_of(4), OPTION_END);
    kept
}

/// Returns an IPv6 options header for `setsockopt`, with a zero next-header byte.
fn settable_header(header: &[u8]) -> Option<Vec<u8>> {
    let [_, rest @ ..] = header else { return None };
    let mut settable = vec![0];
    settable.extend_from_slice(rest);
    Some(settable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_routes_are_left_out_unless_asked_for() {
        let route = [131, 7, 4, 10, 0, 0, 1];
        let alert = [148, 4, 0, 0];
        let options: Vec<u8> = [&[OPTION_NOP][..], &route, &alert].concat();
        assert_eq!(replicable_options(&options, false), [1, 148, 4, 0, 0, 0, 0, 0]);
        assert_eq!(replicable_options(&options, true), options);
    }

    #[test]
    fn options_that_contradict_themselves_end_the_list() {
        assert_eq!(
            replicable_options(&[148, 4, 0, 0, 7, 40, 4, 0], false),
            [148, 4, 0, 0]
        );
        assert!(replicable_options(&[7, 1, 0, 0], false).is_empty());
        assert!(replicable_options(&[7], false).is_empty());
        assert!(replicable_options(&[0, 148, 4, 0], false).is_empty());
    }

    #[test]
    fn the_next_header_is_left_to_the_kernel() {
        assert_eq!(
            settable_header(&[6, 0, 1, 4, 0, 0, 0, 0]),
            Some(vec![0, 0, 1, 4, 0, 0, 0, 0])
        );
        assert_eq!(settable_header(&[]), None);
    }
}
