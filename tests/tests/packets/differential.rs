//! Packets at random through the program as the kernel runs it, each compared with what another parser makes of it.

use std::collections::HashSet;
use std::env;
use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;
use aya::maps::HashMap;
use fastrand::Rng;
use nix::net::if_::if_nametoindex;
use pepsal_ebpf::{Counter, EXTENSION_MAX, FlowKey, SynHead, SynRecord};
use pepsal_tests::Family;
use pepsal_tests::packet::Tcp;

use crate::gateway::{Gateway, Outcome, STEER, count, ethernet, key, program, record, test_run};
use crate::generator::Generator;
use crate::oracle::{Ends, FragmentOf, Kind, Seen, Segment, see};

/// How many packets are compared: `PEPSAL_TEST_PACKETS`, or this.
const PACKETS: u64 = 50_000;

#[test]
fn program_agrees_with_another_parser_about_packets_at_random() -> Result<()> {
    let number = |name: &str| env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let packets = number("PEPSAL_TEST_PACKETS").unwrap_or(PACKETS);
    let seed = number("PEPSAL_TEST_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("PEPSAL_TEST_SEED={seed} PEPSAL_TEST_PACKETS={packets}");

    let mut gateway = Gateway::new()?;
    let (v4, _ends_v4) = gateway.leg(Family::V4)?;
    let (v6, _ends_v6) = gateway.leg(Family::V6)?;
    let pending = Family::BOTH.map(Tcp::syn);
    let ends = |tcp: &Tcp| (tcp.source, tcp.destination);
    let model = Model {
        lan0: gateway.lan0,
        sat0: gateway.topology.gateway.run(|| if_nametoindex("sat0"))?,
        legs: [ends(&v4), ends(&v6)],
        pending: pending.each_ref().map(ends),
        fragments: HashSet::new(),
    };
    let generator = Generator {
        ends: [model.legs, model.pending].concat(),
    };
    for syn in &pending {
        gateway.steer(&syn.packet())?;
    }

    let totals = Counter::ALL.iter().map(|counter| gateway.count(*counter));
    let mut comparison = Comparison {
        totals: totals.collect::<Result<_>>()?,
        ebpf: &mut gateway.ebpf,
        model,
    };
    let before = comparison.totals.clone();
    let (start, mut differences) = (Instant::now(), Vec::new());
    gateway.topology.gateway.run(|| -> Result<()> {
        for i in 0..packets {
            let packet = generator.packet(&mut Rng::with_seed(seed ^ i << 20));
            if let Err(difference) = comparison.compare(&packet) {
                differences.push(format!("packet {i}, {packet:02x?}: {difference:#}"));
            }
            comparison.restore(&pending)?;
        }
        Ok(())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{packets} packets, {:.0} a second", packets as f64 / seconds);
    for (counter, (after, before)) in Counter::ALL.iter().zip(comparison.totals.iter().zip(before)) {
        if *after > before {
            println!("{:>10} {}", after - before, counter.name());
        }
    }
    let shown = differences
        .iter()
        .take(DIFFERENCES_SHOWN)
        .cloned()
        .collect::<Vec<_>>();
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        shown.join("\n")
    );
    Ok(())
}

const DIFFERENCES_SHOWN: usize = 5;

struct Comparison<'a> {
    ebpf: &'a mut Ebpf,
    model: Model,
    /// Of each counter, before the next packet.
    totals: Vec<u64>,
}

impl Comparison<'_> {
    /// Runs the program on a packet.
    ///
    /// # Errors
    /// When counter, mark or record are not as expected.
    fn compare(&mut self, packet: &[u8]) -> Result<()> {
        let frame = ethernet(packet);
        let seen = see(packet, frame[12] == 0x86);
        let expected = self.model.expect(&seen);
        let outcome = test_run(program(self.ebpf, STEER)?, &frame, self.model.lan0)?;
        let Some(counted) = self.moved(expected.counters())? else {
            let counted = self.moved(Counter::ALL)?;
            bail!("{counted:?} instead of {:?}: {seen:?}", expected.counters());
        };
        ensure!(
            outcome == Outcome::of(counted, STEER, self.model.lan0),
            "{counted:?}: {outcome:x?}: {seen:?}"
        );
        match &expected {
            Expected::Recorded(_, syn) => self.model.check(syn, &self.record(syn.ends)?),
            _ => Ok(()),
        }
    }

    /// Which of these counters has moved, by one.
    fn moved(&mut self, counters: &[Counter]) -> Result<Option<Counter>> {
        for counter in counters {
            let total = &mut self.totals[*counter as usize];
            if count(self.ebpf, *counter)? == *total + 1 {
                *total += 1;
                return Ok(Some(*counter));
            }
        }
        Ok(None)
    }

    fn record(&self, (client, server): Ends) -> Result<SynRecord> {
        record(self.ebpf, &FlowKey::between(client, server))
    }

    /// Leaves the pending flows recorded, and no others.
    fn restore(&mut self, pending: &[Tcp]) -> Result<()> {
        let flows = self.ebpf.map_mut("FLOWS").context("FLOWS")?;
        let mut flows: HashMap<_, FlowKey, SynHead> = flows.try_into()?;
        let known: Vec<FlowKey> = flows.keys().collect::<Result<_, _>>()?;
        for stale in known
            .iter()
            .filter(|known| pending.iter().all(|syn| key(syn) != **known))
        {
            flows.remove(stale)?;
        }
        for syn in pending.iter().filter(|syn| !known.contains(&key(syn))) {
            flows.insert(key(syn), SynRecord::EMPTY.head, 0)?;
        }
        Ok(())
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

enum Expected {
    Only([Counter; 1]),
    /// And what is recorded.
    Recorded([Counter; 1], Box<Segment>),
    /// What is broken may pass for any of these reasons.
    Passed(&'static [Counter]),
}

impl Expected {
    fn counters(&self) -> &[Counter] {
        match self {
            Self::Only(counter) | Self::Recorded(counter, _) => counter,
            Self::Passed(counters) => counters,
        }
    }
}

/// What steering promises about what is seen.
struct Model {
    lan0: u32,
    sat0: u32,
    /// Established, as segments that come in name them.
    legs: [Ends; 2],
    /// Recorded, and not accepted yet.
    pending: [Ends; 2],
    /// Whose first fragment was a leg's.
    fragments: HashSet<FragmentOf>,
}

impl Model {
    fn expect(&mut self, seen: &Seen) -> Expected {
        let counter = match seen {
            Seen::Segment(segment) if segment.kind == Kind::Syn && !self.legs.contains(&segment.ends) => {
                return self.expect_of_syn(segment);
            }
            Seen::Segment(segment) => self.expect_of_segment(segment.ends),
            Seen::CutSegment {
                ends,
                kind: Kind::Syn,
            } if !self.legs.contains(ends) => {
                return Expected::Passed(&[
                    Counter::SimultaneousOpen,
                    Counter::Malformed,
                    Counter::NotForwarded,
                    Counter::LinkLocal,
                    Counter::TtlExceeded,
                    Counter::SourceRoute,
                    Counter::TcpAuth,
                    Counter::MpJoin,
                ]);
            }
            Seen::CutSegment { ends, .. } => self.expect_of_segment(*ends),
            Seen::Error { ends } if self.legs.contains(ends) => Counter::IcmpError,
            Seen::Error { .. } => Counter::NoFlow,
            Seen::Fragment {
                of,
                begins: Some((ends, kind)),
            } => match self.legs.contains(ends) && *kind != Kind::Syn {
                true => {
                    self.fragments.extend(of);
                    Counter::Steered
                }
                false => Counter::Fragment,
            },
            Seen::Fragment { of: Some(of), .. } if self.fragments.contains(of) => Counter::Steered,
            Seen::Fragment { .. } | Seen::FragmentQuoted => Counter::Fragment,
            Seen::Waypoint => Counter::SourceRoute,
            Seen::Other => Counter::NotTcp,
            Seen::Broken => {
                return Expected::Passed(&[
                    Counter::Malformed,
                    Counter::NotTcp,
                    Counter::Fragment,
                    Counter::SourceRoute,
                ]);
            }
        };
        Expected::Only([counter])
    }

    fn expect_of_segment(&self, ends: Ends) -> Counter {
        if self.legs.contains(&ends) {
            Counter::Steered
        } else if self.pending.contains(&ends) {
            Counter::Pending
        } else {
            Counter::NoFlow
        }
    }

    fn expect_of_syn(&self, syn: &Segment) -> Expected {
        let counter = match self.forwarded_to(syn.ends) {
            _ if self.pending.contains(&(syn.ends.1, syn.ends.0)) => Counter::SimultaneousOpen,
            None => Counter::NotForwarded,
            Some(_) if is_link_local(syn.ends.0.ip()) => Counter::LinkLocal,
            Some(_) if syn.is_padded() => {
                return Expected::Passed(&[
                    Counter::Malformed,
                    Counter::TtlExceeded,
                    Counter::SourceRoute,
                    Counter::TcpAuth,
                    Counter::MpJoin,
                ]);
            }
            Some(_) if syn.is_at_waypoint() => Counter::SourceRoute,
            Some(_) if syn.ttl <= 1 => Counter::TtlExceeded,
            Some(_) if syn.is_signed() => Counter::TcpAuth,
            Some(_) if syn.joins() => Counter::MpJoin,
            Some(_) => {
                let is_pending = self.pending.contains(&syn.ends);
                let counter = if is_pending {
                    Counter::Retransmitted
                } else {
                    Counter::Intercepted
                };
                return Expected::Recorded([counter], Box::new(syn.clone()));
            }
        };
        Expected::Only([counter])
    }

    /// The index of the interface that the topology's routes lead to; the gateway has no others.
    fn forwarded_to(&self, (source, destination): Ends) -> Option<u32> {
        let net = match (source.ip(), destination.ip()) {
            (IpAddr::V4(_), IpAddr::V4(to)) => match to.octets() {
                [10, net @ 1..=2, 0, 0 | 2..=254] => net,
                _ => return None,
            },
            (IpAddr::V6(from), IpAddr::V6(to)) => match to.segments() {
                // What is of one link only stays there.
                _ if from.is_unicast_link_local() || from.is_multicast() || from.is_loopback() => {
                    return None;
                }
                // The first address is any router's.
                [_, 0, 0, 0, 0, 0, 0, 0 | 1] => return None,
                [net @ 0xfd01..=0xfd02, 0, 0, 0, ..] => net as u8,
                _ => return None,
            },
            _ => return None,
        };
        Some(if net == 1 { self.lan0 } else { self.sat0 })
    }

    fn check(&self, syn: &Segment, record: &SynRecord) -> Result<()> {
        let kept = |header: &[u8]| match header.len() <= EXTENSION_MAX {
            true => header.to_vec(),
            false => Vec::new(),
        };
        let is_truncated = syn.hop_by_hop.len().max(syn.destination_options.len()) > EXTENSION_MAX;
        let egress = self.forwarded_to(syn.ends).context("a SYN that is forwarded")?;
        let numbers = (record.traffic_class, record.ttl, record.truncated);
        let expected = (syn.traffic_class, syn.ttl, is_truncated.into());
        ensure!(numbers == expected, "{numbers:?} is recorded of {syn:?}");
        let interfaces = (record.ingress_ifindex, record.egress_ifindex);
        ensure!(
            interfaces == (self.lan0, egress),
            "{interfaces:?} is recorded of {syn:?}"
        );
        for (what, recorded, expected) in [
            ("IP options", record.ip_options(), syn.ip_options.clone()),
            ("hop-by-hop options", record.hop_by_hop(), kept(&syn.hop_by_hop)),
            (
                "destination options",
                record.destination(),
                kept(&syn.destination_options),
            ),
        ] {
            ensure!(
                recorded == expected,
                "{what} {recorded:02x?} are recorded of {syn:?}"
            );
        }
        Ok(())
    }
}
