//! Selection.

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap};
use pepsal_ebpf::{Counter, PORT_SET_BYTES, PortSet};
use pepsal_tests::Family;
use pepsal_tests::packet::{SERVER_PORT, Tcp};

use crate::gateway::Gateway;

#[test]
fn syn_that_is_not_selected_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        for trie in ["DESTINATIONS", "SOURCES"] {
            gateway.select(trie, family, false)?;
            assert_eq!(
                gateway.steer(&Tcp::syn(family).packet())?,
                Counter::NotSelected,
                "{family:?} {trie}"
            );
            gateway.select(trie, family, true)?;
        }
    }
    assert!(gateway.flows()?.is_empty());
    // Set 1 takes all ports but those around the server's.
    let mut ports = [0xff; PORT_SET_BYTES];
    ports[usize::from(SERVER_PORT) / 8] = !0b0000_0001;
    let mut sets: HashMap<_, u32, PortSet> = gateway
        .ebpf
        .map_mut("PORT_SETS")
        .context("PORT_SETS")?
        .try_into()?;
    sets.insert(1, ports, 0)?;
    for (port, expected) in [
        (79, Counter::Intercepted),
        (80, Counter::NotSelected),
        (81, Counter::Intercepted),
        (65_535, Counter::Intercepted),
        (1, Counter::Intercepted),
    ] {
        let syn = Tcp {
            destination: (Family::V4.server(), port).into(),
            ..Tcp::syn(Family::V4)
        };
        assert_eq!(gateway.steer(&syn.packet())?, expected, "port {port}");
    }
    Ok(())
}

#[test]
fn rules_hold_whose_generation_does() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        gateway.select_in(1, "DESTINATIONS", family, false)?;
        gateway.select_in(1, "SOURCES", family, true)?;
    }
    for (generation, expected) in [
        (0, Counter::Intercepted),
        (1, Counter::NotSelected),
        // Nothing was written for it.
        (2, Counter::NotSelected),
        (0, Counter::Intercepted),
    ] {
        let map = gateway.ebpf.map_mut("GENERATION").context("GENERATION")?;
        Array::<_, u32>::try_from(map)?.set(0, generation, 0)?;
        for family in Family::BOTH {
            assert_eq!(
                gateway.steer(&Tcp::syn(family).packet())?,
                expected,
                "{family:?} {generation}"
            );
        }
        gateway.forget_flows()?;
    }
    Ok(())
}
