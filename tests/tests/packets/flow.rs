//! Segments of flows and legs.

use anyhow::{Context, Result};
use pepsal_ebpf::Counter;
use pepsal_tests::Family;
use pepsal_tests::packet::{ACK, SYN, Tcp};

use crate::gateway::{Gateway, REPLIES, STEER, ethernet, key};

#[test]
fn segments_of_a_flow_that_is_being_set_up_are_steered() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let syn = Tcp {
            ttl: 64,
            ..Tcp::syn(family)
        };
        assert_eq!(gateway.steer(&syn.packet())?, Counter::Intercepted);
        let again = Tcp {
            ttl: 63,
            ..syn.clone()
        };
        assert_eq!(gateway.steer(&again.packet())?, Counter::Retransmitted);
        let (_, record) = gateway
            .flows()?
            .into_iter()
            .find(|(flow, _)| *flow == key(&syn))
            .context("the flow")?;
        assert_eq!(record.ttl, 63, "the newest SYN counts");
        let ack = Tcp::with_flags(family, ACK).packet();
        assert_eq!(gateway.steer(&ack)?, Counter::Pending);
        assert_eq!(
            gateway.run(REPLIES, &ethernet(&ack))?,
            Counter::NoFlow,
            "no server leg is recorded"
        );
        let answer = Tcp::with_flags(family, ACK).swapped();
        assert_eq!(
            gateway.steer(&answer.packet())?,
            Counter::NoFlow,
            "the server is not to answer"
        );
    }
    Ok(())
}

#[test]
fn segments_of_legs_are_taken_on_ingress_and_on_egress() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let (leg, _ends) = gateway.leg(family)?;
        for (name, counter) in [(STEER, Counter::Steered), (REPLIES, Counter::Returned)] {
            for flags in [ACK, 0x04, 0x11, SYN, SYN | ACK] {
                let segment = Tcp { flags, ..leg.clone() };
                assert_eq!(
                    gateway.run(name, &ethernet(&segment.packet()))?,
                    counter,
                    "{flags:#x}"
                );
            }
        }
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn flow_is_known_for_two_generations_and_by_its_syn_at_once() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let (leg, _ends) = gateway.leg(family)?;
        for (generation, slots, is_known) in [
            (1, 0, false),
            (1, 1, true),
            (2, 1, true),
            (3, 1, true),
            (9, 1, false),
            // The count leaves zero out.
            (1, 255, true),
            (2, 255, true),
            (1, 254, true),
            (9, 254, false),
        ] {
            gateway.filter(generation, slots)?;
            for (name, counter) in [(STEER, Counter::Steered), (REPLIES, Counter::Returned)] {
                let expected = if is_known { counter } else { Counter::NoFlow };
                let counted = gateway.run(name, &ethernet(&leg.packet()))?;
                assert_eq!(counted, expected, "{family:?} {name} {generation} {slots}");
            }
        }
        gateway.filter(5, 0)?;
        assert_eq!(gateway.steer(&Tcp::syn(family).packet())?, Counter::Intercepted);
        let ack = Tcp::with_flags(family, ACK).packet();
        assert_eq!(gateway.steer(&ack)?, Counter::Pending);
    }
    Ok(())
}
