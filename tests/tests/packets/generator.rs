//! Packets at random: most of them sound and of connections that matter, many odd, some broken.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use fastrand::Rng;
use pepsal_tests::Family;

use pepsal_tests::packet::{
    AUTHENTICATION, DESTINATION, ESP, FRAGMENT, HOP_BY_HOP, MOBILITY, ROUTING, SYN, Tcp,
};

/// Puts packets together about connections whose ends are given, and about others.
pub struct Generator {
    pub ends: Vec<(SocketAddr, SocketAddr)>,
}

/// The longest packet, which leaves room below the page that a test run takes.
const LONGEST: usize = 1400;

impl Generator {
    /// A packet from its IP header on, as long as that at least.
    pub fn packet(&self, rng: &mut Rng) -> Vec<u8> {
        let tcp = self.segment(rng);
        let family = if tcp.source.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        let mut packet = match rng.u8(..100) {
            0..80 => tcp.ip(6, &segment_bytes(&tcp, rng)),
            80..95 => self.error(&tcp, rng),
            _ => {
                let payload = bytes(rng, 0..60);
                tcp.ip(rng.u8(..), &payload)
            }
        };
        if family == Family::V4 && rng.u8(..100) < 15 {
            fragment(&mut packet, rng);
        }
        packet.truncate(LONGEST);
        let header = if family == Family::V4 { 20 } else { 40 };
        match rng.u8(..100) {
            0..60 => {}
            60..72 => packet.truncate(rng.usize(header..=packet.len())),
            72..76 => packet.extend(bytes(rng, 1..60)),
            _ => {
                for _ in 0..rng.u8(1..4) {
                    let at = rng.usize(..packet.len().min(120));
                    packet[at] = match rng.bool() {
                        true => rng.u8(..),
                        false => packet[at] ^ (1 << rng.u8(..8)),
                    };
                }
            }
        }
        // What a test run takes for a whole IP header, whatever has become of the version.
        packet.resize(packet.len().max(40), 0);
        packet
    }

    fn segment(&self, rng: &mut Rng) -> Tcp {
        let (source, destination) = self.ends_of_segment(rng);
        let is_v4 = source.is_ipv4();
        Tcp {
            source,
            destination,
            flags: match rng.u8(..10) {
                0..5 => SYN,
                5 => SYN | rng.choice([0x40, 0x80, 0xc0, 0x08, 0x20]).unwrap_or_default(),
                6 | 7 => 0x10,
                8 => 0x12,
                _ => rng.u8(..),
            },
            traffic_class: rng.u8(..),
            ttl: rng.u8(..),
            flow_label: rng.u32(..1 << 20),
            ip_options: if is_v4 {
                options(rng, &[7, 68, 131, 137, 148])
            } else {
                Vec::new()
            },
            extensions: if is_v4 { Vec::new() } else { extensions(rng) },
            tcp_options: options(rng, &[2, 3, 4, 8, 19, 29, 30, 34]),
            ..Tcp::syn(Family::V4)
        }
    }

    fn ends_of_segment(&self, rng: &mut Rng) -> (SocketAddr, SocketAddr) {
        let known = self.ends[rng.usize(..self.ends.len())];
        match rng.u8(..100) {
            0..30 => known,
            30..35 => (known.1, known.0),
            35..40 => match (mapped(known.0), mapped(known.1)) {
                (Some(source), Some(destination)) => (source, destination),
                _ => known,
            },
            40..45 => {
                let source = any_address(rng, known.0.is_ipv4());
                ((source, rng.u16(..)).into(), known.1)
            }
            45..55 => {
                let destination = any_address(rng, known.0.is_ipv4());
                (known.0, (destination, rng.u16(..)).into())
            }
            _ => {
                let family = if rng.bool() { Family::V4 } else { Family::V6 };
                (
                    (family.client(), rng.u16(1..)).into(),
                    (family.server(), rng.u16(1..)).into(),
                )
            }
        }
    }

    /// An ICMP error about another segment, which quotes a part of it.
    fn error(&self, router: &Tcp, rng: &mut Rng) -> Vec<u8> {
        let mut about = self.segment(rng);
        while about.source.is_ipv4() != router.source.is_ipv4() {
            about = self.segment(rng);
        }
        let mut quote = match rng.u8(..10) {
            0 => about.ip(rng.u8(..), &bytes(rng, 0..60)),
            _ => about.ip(6, &segment_bytes(&about, rng)),
        };
        if about.source.is_ipv4() && rng.u8(..10) == 0 {
            fragment(&mut quote, rng);
        }
        if rng.bool() {
            quote.truncate(rng.usize(..=quote.len()));
        }
        let is_v4 = router.source.is_ipv4();
        let kind = match rng.u8(..4) {
            0 => rng.u8(..),
            _ if is_v4 => rng.choice([3, 11, 12]).unwrap_or_default(),
            _ => rng.u8(1..5),
        };
        let message = [&[kind, rng.u8(..), 0, 0, 0, 0, 0, 0][..], &quote].concat();
        router.ip(if is_v4 { 1 } else { 58 }, &message)
    }
}

fn segment_bytes(tcp: &Tcp, rng: &mut Rng) -> Vec<u8> {
    [tcp.segment(), bytes(rng, 0..40)].concat()
}

fn bytes(rng: &mut Rng, len: std::ops::Range<usize>) -> Vec<u8> {
    let len = rng.usize(len);
    std::iter::repeat_with(|| rng.u8(..)).take(len).collect()
}

/// Makes an IPv4 packet say that it is a fragment, of one of a few packets.
fn fragment(packet: &mut [u8], rng: &mut Rng) {
    packet[4..6].copy_from_slice(&[0, rng.u8(..8)]);
    packet[6] = rng.choice([0x20, 0x20, 0x00, 0x40, 0x80]).unwrap_or_default();
    packet[7] = rng.choice([0, 0, 1, 185]).unwrap_or_default();
}

fn mapped(ends: SocketAddr) -> Option<SocketAddr> {
    match ends.ip() {
        IpAddr::V4(v4) => Some((v4.to_ipv6_mapped(), ends.port()).into()),
        IpAddr::V6(_) => None,
    }
}

/// Near and far, the gateway's own, and those that nobody has.
fn any_address(rng: &mut Rng, is_v4: bool) -> IpAddr {
    let (net, host) = (rng.u8(..5), rng.choice([0, 1, 2, 3, 77, 255]).unwrap_or_default());
    match (is_v4, rng.u8(..8)) {
        (true, 0) => IpAddr::from(rng.u32(..).to_be_bytes()),
        (true, 1) => IpAddr::from([rng.choice([0, 127, 224, 255]).unwrap_or_default(), 0, 0, host]),
        (true, _) => IpAddr::from([10, net, 0, host]),
        (false, 0) => IpAddr::from(rng.u128(..).to_be_bytes()),
        (false, 1) => Ipv6Addr::from(u128::from(rng.u8(..2))).into(),
        (false, 2) => {
            let prefix = rng.choice([0xfe80, 0xff02, 0xff0e]).unwrap_or_default();
            Ipv6Addr::new(prefix, 0, 0, 0, 0, 0, 0, host.into()).into()
        }
        (false, _) => Ipv6Addr::new(0xfd00 | u16::from(net), 0, 0, 0, 0, 0, 0, host.into()).into(),
    }
}

/// Options of IPv4 or TCP: none, well-formed ones of these kinds and others, or mere bytes; at most forty.
fn options(rng: &mut Rng, kinds: &[u8]) -> Vec<u8> {
    let mut options = Vec::new();
    match rng.u8(..8) {
        0..3 => return options,
        3 if rng.u8(..8) == 0 => options = vec![1; 36],
        3 => options = bytes(rng, 0..41),
        _ => {
            while options.len() < 40 && rng.u8(..8) > 0 {
                let kind = match rng.u8(..4) {
                    0 => 1,
                    1 => rng.u8(..),
                    _ => kinds[rng.usize(..kinds.len())],
                };
                if kind < 2 {
                    options.push(kind);
                    continue;
                }
                let data = bytes(rng, 0..20);
                options.extend([kind, data.len() as u8 + 2]);
                options.extend(data);
            }
            // Some lie about the length of the last.
            if rng.u8(..8) > 0 && options.len() > 40 {
                options.clear();
            }
        }
    }
    options.truncate(40);
    options.resize(options.len().next_multiple_of(4), 0);
    options
}

fn extensions(rng: &mut Rng) -> Vec<(u8, Vec<u8>)> {
    let most = match rng.u8(..20) {
        0..8 => 0,
        8..19 => 3,
        _ => 10,
    };
    let extension = |rng: &mut Rng| {
        let kind = match rng.u8(..20) {
            0..6 => HOP_BY_HOP,
            6..10 => ROUTING,
            10..15 => DESTINATION,
            15..18 => FRAGMENT,
            18 => rng.choice([AUTHENTICATION, ESP, MOBILITY]).unwrap_or_default(),
            _ => rng.u8(..),
        };
        if kind == FRAGMENT {
            let offset = rng.choice([[0, 0], [0, 1], [0, 1], [0, 8], [0, 9], [0xff, 0xf9]]);
            let [high, low] = offset.unwrap_or_default();
            return (kind, vec![0, high, low, 0, 0, 0, rng.u8(..8)]);
        }
        // Now and then longer than a record holds.
        let eights = if rng.u8(..10) == 0 {
            rng.u8(10..20)
        } else {
            rng.u8(..3)
        };
        let mut rest = vec![eights];
        rest.extend(std::iter::repeat_with(|| rng.u8(..)).take(usize::from(eights) * 8 + 6));
        if kind == ROUTING && rng.u8(..8) > 0 {
            rest[2] = 0;
        }
        (kind, rest)
    };
    (0..rng.u8(..=most)).map(|_| extension(rng)).collect()
}
