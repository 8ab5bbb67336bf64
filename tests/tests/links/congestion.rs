//! Initial windows and congestion control.

use std::time::Duration;

use anyhow::{Context, Result};
use pepsal_tests::{Family, Link, LinkProfile, Side, Topology};

use crate::explanation::rows;
use crate::{on_default, start, with_link};

#[test]
fn legs_through_the_link_start_with_its_initial_window() -> Result<()> {
    // One with a window of its own in its congestion control, one without.
    for (side, settings, arguments) in [
        (Side::Server, "cc=cubic", &[][..]),
        (Side::Server, "cc=bbr", &[]),
        (Side::Client, "cc=cubic", &[]),
        (Side::Client, "cc=bbr", &[]),
        (Side::Server, "cc=cubic", &["--source", "gateway"]),
    ] {
        let settings = format!("rate=20mbit,rtt=100ms,iw=64KiB,{settings}");
        let bed = with_link(side, &settings, arguments)?;
        for family in Family::BOTH {
            let flow = bed.flow(family)?;
            bed.expect(&flow, side, |leg| leg.window == 65_536 / leg.mss, true);
            bed.expect(&flow, side.other(), |leg| leg.window, 10);
        }
    }
    Ok(())
}

#[test]
fn initial_window_is_what_the_pacing_rate_sends_in_a_round_trip() -> Result<()> {
    let bed = with_link(Side::Server, "rate=20mbit,pacing=16mbit,rtt=100ms,cc=cubic", &[])?;
    let flow = bed.flow(Family::V4)?;
    bed.expect(&flow, Side::Server, |leg| leg.window, 200_000 / 1448);
    Ok(())
}

/// BBR's pacing is for paths that are long.
#[test]
fn where_bbr_is_the_default_short_legs_go_without() -> Result<()> {
    let far = LinkProfile::symmetric(50_000_000, Duration::from_millis(100), 0.0);
    let topology = Topology::builder().link(Link::Emulated(far)).build()?;
    let bed = on_default("bbr", topology, &[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        bed.expect(&flow, Side::Client, |leg| leg.congestion.clone(), "cubic".into());
        bed.expect(&flow, Side::Server, |leg| leg.congestion.clone(), "bbr".into());
    }
    Ok(())
}

#[test]
fn congestion_control_is_the_links_the_sides_everyones_or_derived_in_this_order() -> Result<()> {
    let plain = "sat0,rate=20mbit,rtt=100ms";
    for (arguments, client, server) in [
        (&[][..], "reno", "reno"),
        (
            &["--link", "sat0,rate=20mbit,rtt=100ms,cc=cubic"],
            "reno",
            "cubic",
        ),
        (
            &["--link", "lan0,rate=20mbit,rtt=100ms,cc=cubic"],
            "cubic",
            "reno",
        ),
        (
            &[
                "--link",
                "sat0,rate=20mbit,rtt=100ms,cc=cubic",
                "--server-congestion",
                "bbr",
                "-C",
                "bbr",
            ],
            "bbr",
            "cubic",
        ),
        (
            &[
                "--link",
                "lan0,rate=20mbit,rtt=100ms,cc=cubic",
                "--client-congestion",
                "bbr",
                "-C",
                "bbr",
            ],
            "cubic",
            "bbr",
        ),
        (
            &["--link", plain, "--server-congestion", "cubic", "-C", "bbr"],
            "bbr",
            "cubic",
        ),
        (&["--link", plain, "-C", "cubic"], "cubic", "cubic"),
    ] {
        let bed = start(arguments).with_context(|| arguments.join(" "))?;
        let flow = bed.flow(Family::V4)?;
        for (side, congestion) in [(Side::Client, client), (Side::Server, server)] {
            bed.expect(&flow, side, |leg| leg.congestion.clone(), congestion.to_owned());
        }
    }
    // What is derived depends on the kernel; the daemon says at its start what it is.
    let bed = start(&["--link", plain])?;
    let log = bed.daemon.log();
    let (_, derived) = rows(&log)
        .find(|(name, _)| name == "congestion")
        .context(log.clone())?;
    let flow = bed.flow(Family::V4)?;
    bed.expect(&flow, Side::Server, |leg| leg.congestion.clone(), derived.value);
    bed.expect(&flow, Side::Client, |leg| leg.congestion.clone(), "reno".into());
    Ok(())
}
