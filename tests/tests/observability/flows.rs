//! `pepsal flows` and `pepsal close`.

use std::io::{ErrorKind, Read, Write};
use std::thread;

use anyhow::{Context, Result, ensure};
use pepsal_tests::{Daemon, Family, Namespace, PATIENCE, eventually};
use serde_json::{Value, json};

use crate::{MIB, Watched};

#[test]
fn listed_flows_are_those_that_the_kernel_has() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        (&flow.client).write_all(&[1; 5000])?;
        (&flow.server).read_exact(&mut [0; 5000])?;
        (&flow.server).write_all(&[2; 700])?;
        (&flow.client).read_exact(&mut [0; 700])?;
        let client = flow.client.local_addr()?;
        let port = client.port().to_string();
        let address = client.ip().to_string();
        let mut seen = Value::Null;
        eventually(PATIENCE, || {
            seen = bed.flows(&["--client", &address]).unwrap_or_default();
            seen["list"][0]["bytes"] == json!({"up": 5000, "down": 700})
        });
        let shown = &seen["list"][0];
        assert_eq!(
            seen["list"].as_array().map(Vec::len),
            Some(1),
            "{seen} port {port}"
        );
        assert_eq!(shown["client"], json!(client));
        assert_eq!(shown["server"], json!(flow.client.peer_addr()?));
        assert_eq!(shown["state"], "open");
        let kernel = bed.daemon.legs()?;
        for (side, interface, peer) in [
            ("client", "lan0", client),
            ("server", "sat0", flow.client.peer_addr()?),
        ] {
            let leg = &shown["legs"][side];
            let same = kernel.iter().find(|leg| leg.peer == peer);
            let same = same.with_context(|| format!("ss shows no {side} leg"))?;
            assert_eq!(leg["interface"], interface);
            assert_eq!(leg["state"], "established");
            assert_eq!(leg["local"], json!(same.local));
            assert_eq!(leg["peer"], json!(same.peer));
            assert_eq!(leg["congestion"], json!(same.congestion));
            assert_eq!(leg["cwnd_segments"], json!(same.window));
            assert_eq!(leg["mss_bytes"], json!(same.mss));
            assert!(
                leg["rtt_seconds"]
                    .as_f64()
                    .is_some_and(|rtt| rtt > 0.0 && rtt < 1.0)
            );
        }
        // The table shows the same.
        let table = String::from_utf8(bed.pepsal(&["flows", "--interval", "0"])?.stdout)?;
        assert!(
            table.contains(&client.to_string()) && table.ends_with("\n1 flow\n"),
            "{table}"
        );
        drop(flow);
        eventually(PATIENCE, || bed.flows(&[]).is_ok_and(|flows| flows["total"] == 0));
    }
    Ok(())
}

#[test]
fn flows_are_filtered_sorted_and_limited() -> Result<()> {
    let bed = Watched::start(&[])?;
    let (v4, v6) = (bed.flow(Family::V4)?, bed.flow(Family::V6)?);
    (&v6.client).write_all(&[1; 5000])?;
    (&v6.server).read_exact(&mut [0; 5000])?;
    let clients = |arguments: &[&str]| -> Result<String> {
        let flows = bed.flows(arguments)?;
        let list = flows["list"].as_array().context("a list")?;
        let clients: Vec<_> = list.iter().filter_map(|flow| flow["client"].as_str()).collect();
        Ok(clients.join(" "))
    };
    let (first, second) = (
        v4.client.local_addr()?.to_string(),
        v6.client.local_addr()?.to_string(),
    );
    let both = format!("{first} {second}");
    eventually(PATIENCE, || {
        clients(&["--sort", "bytes"]).is_ok_and(|sorted| sorted == format!("{second} {first}"))
    });
    assert_eq!(clients(&[])?, both);
    assert_eq!(clients(&["--limit", "1"])?, first);
    assert_eq!(clients(&["--server", "fd02::/16"])?, second);
    let port = v4.client.peer_addr()?.port().to_string();
    assert_eq!(clients(&["--port", &port])?, first);
    assert_eq!(clients(&["--interface", "sat0"])?, both);
    assert_eq!(clients(&["--interface", "nosuch0"])?, "");
    assert_eq!(clients(&["--state", "pending"])?, "");
    let wrong = bed.pepsal(&["flows", "--client", "lan0"])?;
    assert_eq!(
        String::from_utf8(wrong.stderr)?,
        "pepsal: 'lan0' is neither an address nor a prefix\n"
    );
    Ok(())
}

#[test]
fn leg_that_limits_is_named() -> Result<()> {
    let bed = Watched::start(&[])?;
    let flow = bed.flow(Family::V4)?;
    // The server reads nothing: its window, and then everything up to the client, fills.
    flow.client.set_nonblocking(true)?;
    let chunk = vec![0; 1 << 16];
    eventually(PATIENCE, || {
        while (&flow.client).write(&chunk).is_ok() {}
        let flows = bed.flows(&[]).unwrap_or_default();
        flows["list"][0]["limited"]["up"] == json!({"leg": "server", "by": "receiver"})
    });
    assert_eq!(bed.flows(&[])?["list"][0]["limited"]["down"], Value::Null);
    Ok(())
}

#[test]
fn rates_are_measured_over_the_interval() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=16mbit,rtt=20ms"])?;
    let flow = bed.flow(Family::V4)?;
    thread::scope(|scope| -> Result<()> {
        scope.spawn(|| std::io::copy(&mut &flow.server, &mut std::io::sink()));
        scope.spawn(|| {
            // Ended by the reset below.
            let _ = (&flow.client).write_all(&vec![0; 64 * MIB as usize]);
        });
        eventually(PATIENCE, || {
            let flows = bed.flows(&["--interval", "500ms"]).unwrap_or_default();
            let rate = flows["list"][0]["bytes_per_second"]["up"].as_f64().unwrap_or(0.0);
            let limited = &flows["list"][0]["limited"]["up"];
            (1.2e6..2.4e6).contains(&rate) && *limited == json!({"leg": "server", "by": "share"})
        });
        ensure!(bed.pepsal(&["close", "10.1.0.2"])?.status.success());
        Ok(())
    })
}

#[test]
fn closed_flow_is_reset_at_both_ends() -> Result<()> {
    let bed = Watched::start(&[])?;
    for (family, by_id) in [(Family::V4, true), (Family::V6, false)] {
        let flow = bed.flow(family)?;
        let id = bed.flows(&[])?["list"][0]["id"].to_string();
        let (client, server) = (flow.client.local_addr()?.to_string(), flow.client.peer_addr()?);
        let which = if by_id { &id } else { &client };
        let closed = bed.pepsal(&["close", which])?;
        let said = String::from_utf8(closed.stdout)?;
        assert_eq!(said, format!("closed {id}: {client} to {server}\n"));
        for mut end in [flow.client, flow.server] {
            let error = end.read(&mut [0]).expect_err("an end of stream would be a lie");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    bed.eventually_scraped(|scrape| {
        scrape.of("pepsal_flows_closed_total", &[("reason", "administrative")]) == 2.0
    })?;
    let again = bed.pepsal(&["close", "1"])?;
    assert!(!again.status.success());
    assert_eq!(String::from_utf8(again.stderr)?, "pepsal: there is no flow 1\n");
    Ok(())
}

#[test]
fn commands_say_when_there_is_no_daemon() -> Result<()> {
    let nowhere = Namespace::new("nowhere")?;
    for command in [&["status"][..], &["flows"], &["clients"], &["close", "1"]] {
        let arguments = [command, &["--admin-socket", "/nonexistent/pepsal.sock"]].concat();
        let output = Daemon::command(&nowhere, &arguments)?.output()?;
        assert!(!output.status.success());
        assert_eq!(
            String::from_utf8(output.stderr)?,
            "pepsal: no daemon listens at /nonexistent/pepsal.sock: is it running, and with this --admin-socket?\n"
        );
    }
    Ok(())
}
