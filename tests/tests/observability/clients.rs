//! `pepsal clients`, and what the metrics have of subscribers.

use std::io::{Read, Write};
use std::thread;

use anyhow::{Context, Result, ensure};
use pepsal_tests::{Connection, Family, PATIENCE, eventually};
use serde_json::{Value, json};

use crate::scrape::Scrape;
use crate::{MIB, Watched};

impl Watched {
    fn clients(&self, arguments: &[&str]) -> Result<Value> {
        let interval: &[&str] = match arguments.contains(&"--interval") {
            true => &[],
            false => &["--interval", "0"],
        };
        let output = self.pepsal(&[&["clients", "--json"], interval, arguments].concat())?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// The subscribers of an answer, in its order.
fn names(clients: &Value) -> Result<String> {
    let list = clients["list"].as_array().context("a list")?;
    let names: Vec<_> = list
        .iter()
        .filter_map(|client| client["client"].as_str())
        .collect();
    Ok(names.join(" "))
}

/// Sends bytes up, and waits until the server has them.
fn send(flow: &Connection, bytes: usize) -> Result<()> {
    thread::scope(|scope| -> Result<()> {
        let received = scope.spawn(|| (&flow.server).read_exact(&mut vec![0; bytes]));
        (&flow.client).write_all(&vec![1; bytes])?;
        Ok(received.join().expect("reading does not panic")?)
    })
}

#[test]
fn listed_clients_have_the_sums_over_their_flows() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let flows = [
        bed.flow(Family::V4)?,
        bed.flow(Family::V4)?,
        bed.flow(Family::V6)?,
    ];
    send(&flows[0], 5000)?;
    send(&flows[1], 300)?;
    send(&flows[2], 200)?;
    (&flows[2].server).write_all(&[2; 100_000])?;
    (&flows[2].client).read_exact(&mut [0; 100_000])?;
    let mut seen = Value::Null;
    eventually(PATIENCE, || {
        seen = bed.clients(&["--sort", "flows"]).unwrap_or_default();
        seen["list"][0]["bytes"] == json!({"up": 5300, "down": 0})
            && seen["list"][1]["bytes"] == json!({"up": 200, "down": 100_000})
    });
    assert_eq!(seen["total"], 2);
    assert_eq!(names(&seen)?, "10.1.0.2 fd01::/64");
    for (index, open) in [(0, 2), (1, 1)] {
        let client = &seen["list"][index];
        assert_eq!(client["flows"], json!({"open": open, "pending": 0}));
        for side in ["client", "server"] {
            let leg = &client["legs"][side];
            assert_eq!(leg["open"], open, "{side}: {leg}");
            let [mean, least] =
                ["rtt_seconds", "rtt_min_seconds"].map(|rtt| leg[rtt].as_f64().unwrap_or(0.0));
            assert!(0.0 < least && least <= mean && mean < 1.0, "{side}: {leg}");
        }
        let sent = &client["legs"]["server"]["sent_segments"];
        assert!(sent.as_u64() >= Some(open), "{client}");
    }
    // The table shows the same.
    let table = String::from_utf8(bed.pepsal(&["clients", "--interval", "0"])?.stdout)?;
    assert!(
        table.contains("\n10.1.0.2 ") && table.contains("\nfd01::/64 ") && table.ends_with("\n2 clients\n"),
        "{table}"
    );
    drop(flows);
    eventually(PATIENCE, || {
        bed.clients(&[]).is_ok_and(|clients| clients["total"] == 0)
    });
    Ok(())
}

#[test]
fn clients_are_filtered_sorted_and_limited() -> Result<()> {
    let bed = Watched::start(&[])?;
    let (v4, v6) = (bed.flow(Family::V4)?, bed.flow(Family::V6)?);
    send(&v6, 5000)?;
    let listed = |arguments: &[&str]| names(&bed.clients(arguments)?);
    eventually(PATIENCE, || {
        listed(&["--sort", "bytes"]).is_ok_and(|sorted| sorted == "fd01::/64 10.1.0.2")
    });
    assert_eq!(
        listed(&[])?,
        "fd01::/64 10.1.0.2",
        "by rate unless asked otherwise"
    );
    send(&v4, 100_000)?;
    eventually(PATIENCE, || {
        listed(&["--sort", "bytes", "--limit", "1"]).is_ok_and(|sorted| sorted == "10.1.0.2")
    });
    assert_eq!(bed.clients(&["--limit", "1"])?["total"], 2);
    assert_eq!(listed(&["--server", "fd02::/16"])?, "fd01::/64");
    assert_eq!(listed(&["--client", "10.1.0.2"])?, "10.1.0.2");
    let port = v4.client.peer_addr()?.port().to_string();
    assert_eq!(listed(&["--port", &port])?, "10.1.0.2");
    assert_eq!(listed(&["--interface", "nosuch0"])?, "");
    assert_eq!(listed(&["--state", "pending"])?, "");
    let wrong = bed.pepsal(&["clients", "--client", "lan0"])?;
    assert_eq!(
        String::from_utf8(wrong.stderr)?,
        "pepsal: 'lan0' is neither an address nor a prefix\n"
    );
    let wrong = bed.pepsal(&["clients", "--interval", "11s"])?;
    assert_eq!(
        String::from_utf8(wrong.stderr)?,
        "pepsal: interval_ms 11000 is more than 10000\n"
    );
    Ok(())
}

#[test]
fn totals_of_subscribers_are_metrics() -> Result<()> {
    let bed = Watched::start(&[])?;
    let flows = [
        bed.flow(Family::V4)?,
        bed.flow(Family::V6)?,
        bed.flow(Family::V6)?,
    ];
    let is = |scrape: &Scrape, name: &str, value: f64| scrape.of(&format!("pepsal_{name}"), &[]) == value;
    bed.eventually_scraped(|scrape| {
        is(scrape, "subscribers", 2.0)
            && is(scrape, "subscriber_flows_max", 2.0)
            && is(scrape, "subscriber_bytes_max_ratio", 0.0)
    })?;
    send(&flows[0], 5000)?;
    bed.eventually_scraped(|scrape| is(scrape, "subscriber_bytes_max_ratio", 1.0))?;
    drop(flows);
    bed.eventually_scraped(|scrape| {
        is(scrape, "subscribers", 0.0)
            && is(scrape, "subscriber_flows_max", 0.0)
            && is(scrape, "subscriber_bytes_max_ratio", 0.0)
    })?;
    Ok(())
}

#[test]
fn client_that_sends_comes_first() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=16mbit,rtt=20ms"])?;
    let (idle, busy) = (bed.flow(Family::V4)?, bed.flow(Family::V6)?);
    // More than the other will have sent when it has its turn.
    send(&idle, 8 * MIB as usize)?;
    thread::scope(|scope| -> Result<()> {
        scope.spawn(|| std::io::copy(&mut &busy.server, &mut std::io::sink()));
        scope.spawn(|| {
            // Ended by the reset below.
            let _ = (&busy.client).write_all(&vec![0; 64 * MIB as usize]);
        });
        eventually(PATIENCE, || {
            let clients = bed.clients(&["--interval", "500ms"]).unwrap_or_default();
            let rate = clients["list"][0]["bytes_per_second"]["up"]
                .as_f64()
                .unwrap_or(0.0);
            clients["list"][0]["client"] == "fd01::/64" && (1.2e6..2.4e6).contains(&rate)
        });
        ensure!(bed.pepsal(&["close", "fd01::2"])?.status.success());
        Ok(())
    })
}
