//! The packet parser, beside another one.

use std::net::IpAddr;

use pepsal_ebpf::{
    Counter, EXTENSION_MAX, FlowKey, SynRecord,
    packet::{Family, Parsed, TcpOptions, first_fragment, fragment_key, parse, record_syn},
};

#[path = "../../tests/tests/packets/oracle.rs"]
mod oracle;

use oracle::{Ends, Kind, Seen, Segment, see};

/// The first byte says which protocol the others are of. Both parsers see the same.
pub fn exercise(data: &[u8]) {
    let Some((first, packet)) = data.split_first() else {
        return;
    };
    let is_v6 = first & 1 == 1;
    let family = if is_v6 { Family::V6 } else { Family::V4 };
    let (parsed, seen) = (parse(&packet, family), see(packet, is_v6));
    match (&parsed, &seen) {
        (Ok(Parsed::Tcp(segment)), Seen::Segment(other)) => {
            assert_eq!(segment.flow(), key(other.ends));
            assert_eq!(segment.is_syn(), other.kind == Kind::Syn);
            if segment.is_syn() {
                let mut record = SynRecord::EMPTY;
                let recorded = record_syn(&packet, segment, &mut record, &mut { TcpOptions::EMPTY });
                check_record(recorded, &record, other);
            }
        }
        (Ok(Parsed::Tcp(segment)), Seen::CutSegment { ends, .. }) => {
            assert_eq!(segment.flow(), key(*ends));
            assert!(
                record_syn(&packet, segment, &mut SynRecord::EMPTY.clone(), &mut {
                    TcpOptions::EMPTY
                })
                .is_err()
            );
        }
        (Ok(Parsed::IcmpError(segment)), Seen::Error { ends }) => assert_eq!(segment.flow(), key(*ends)),
        (Err(Counter::Fragment), Seen::Fragment { of, begins }) => {
            assert_eq!(fragment_key(&packet, family).is_some(), of.is_some());
            let first = first_fragment(&packet, family).ok().map(|segment| segment.flow());
            assert_eq!(first, begins.map(|(ends, _)| key(ends)));
        }
        (Err(Counter::Fragment), Seen::FragmentQuoted)
        | (Err(Counter::SourceRoute), Seen::Waypoint)
        | (Err(Counter::NotTcp), Seen::Other)
        | (Err(_), Seen::Broken) => {}
        _ => panic!("{parsed:?}, and not {seen:?}"),
    }
}

fn key((source, destination): Ends) -> FlowKey {
    FlowKey::between(source, destination)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn check_record(recorded: Result<(), Counter>, record: &SynRecord, syn: &Segment) {
    match recorded {
        Err(Counter::LinkLocal) => assert!(is_link_local(syn.ends.0.ip())),
        _ if syn.is_padded() => assert!(recorded.is_err()),
        Err(Counter::SourceRoute) => assert!(syn.is_at_waypoint()),
        Err(Counter::TcpAuth) => assert!(syn.is_signed()),
        Err(Counter::MpJoin) => assert!(syn.joins()),
        Err(Counter::TtlExceeded) => assert!(syn.ttl <= 1),
        Err(other) => panic!("{other:?}"),
        Ok(()) => {
            assert!(!syn.is_at_waypoint() && !syn.is_signed() && !syn.joins());
            assert!(syn.ttl > 1 && !is_link_local(syn.ends.0.ip()));
            let kept = |header: &[u8]| if header.len() > EXTENSION_MAX { &[] } else { header }.to_vec();
            assert_eq!(record.ip_options(), syn.ip_options);
            assert_eq!(record.hop_by_hop(), kept(&syn.hop_by_hop));
            assert_eq!(record.destination(), kept(&syn.destination_options));
            assert_eq!((record.traffic_class, record.ttl), (syn.traffic_class, syn.ttl));
        }
    }
}
