//! Fragments.

use anyhow::{Context, Result};
use aya::maps::HashMap;
use pepsal_ebpf::Counter;
use pepsal_tests::Family;
use pepsal_tests::packet::{FRAGMENT, Tcp};

use crate::gateway::Gateway;

#[test]
fn fragments_go_where_the_first_of_their_packet_went() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let (leg, _streams) = gateway.leg(Family::V4)?;
    let fragment = |of: &Tcp, flags_and_offset: [u8; 2], id: u8| {
        let mut packet = of.packet();
        packet[4..6].copy_from_slice(&[1, id]);
        packet[6..8].copy_from_slice(&flags_and_offset);
        packet
    };
    for (flags_and_offset, id, expected) in [
        // Before the first one, and without it.
        ([0x20, 0x01], 1, Counter::Fragment),
        ([0x00, 0x01], 1, Counter::Fragment),
        ([0x1f, 0x00], 1, Counter::Fragment),
        ([0x20, 0x00], 1, Counter::Steered),
        ([0x20, 0x01], 1, Counter::Steered),
        ([0x00, 0x02], 1, Counter::Steered),
        // Another packet's.
        ([0x00, 0x02], 2, Counter::Fragment),
    ] {
        let counted = gateway.steer(&fragment(&leg, flags_and_offset, id))?;
        assert_eq!(counted, expected, "{flags_and_offset:x?} of {id}");
    }
    // Of what is not a leg's all of them pass, a SYN's too.
    for flags_and_offset in [[0x20, 0x00], [0x20, 0x01], [0x00, 0x02]] {
        let packet = fragment(&Tcp::syn(Family::V4), flags_and_offset, 3);
        assert_eq!(gateway.steer(&packet)?, Counter::Fragment);
    }

    let (leg, _streams) = gateway.leg(Family::V6)?;
    let fragment = |offset: [u8; 2], id: u8| {
        let header = vec![0, offset[0], offset[1], 0, 0, 0, id];
        Tcp {
            extensions: vec![(FRAGMENT, header)],
            ..leg.clone()
        }
        .packet()
    };
    assert_eq!(gateway.steer(&fragment([0, 9], 7))?, Counter::Fragment);
    assert_eq!(gateway.steer(&fragment([0, 1], 7))?, Counter::Steered);
    assert_eq!(gateway.steer(&fragment([0, 9], 7))?, Counter::Steered);
    assert_eq!(gateway.steer(&fragment([0, 8], 8))?, Counter::Fragment);
    Ok(())
}

#[test]
fn flood_of_fragments_fills_its_map_and_no_more() -> Result<()> {
    const MOST: usize = 4096;
    let mut gateway = Gateway::new()?;
    let (leg, _streams) = gateway.leg(Family::V4)?;
    for id in 0..5000_u16 {
        let mut first = leg.packet();
        first[4..6].copy_from_slice(&id.to_be_bytes());
        first[6..8].copy_from_slice(&[0x20, 0x00]);
        assert_eq!(gateway.steer(&first)?, Counter::Steered, "{id}");
    }
    let fragments = gateway.ebpf.map("FRAGMENTS").context("FRAGMENTS")?;
    let fragments: HashMap<_, [u8; 40], u8> = fragments.try_into()?;
    let known = fragments.keys().count();
    assert!((MOST / 2..=MOST).contains(&known), "{known} packets");
    Ok(())
}
