//! `pepsal top`.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result};
use pepsal_tests::{Daemon, Family, PATIENCE, eventually};

use crate::Watched;

#[test]
fn top_draws_what_is_there() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let flow = bed.flow(Family::V4)?;
    (&flow.client).write_all(&[1; 5000])?;
    (&flow.server).read_exact(&mut [0; 5000])?;
    let output = bed.pepsal(&["top", "--once", "--interval", "100ms", "--size", "160x24"])?;
    let shown = String::from_utf8(output.stdout)?;
    assert_eq!(shown.lines().count(), 24, "{shown}");
    for part in [
        "1 of 2112 flows",
        "sat0: ",
        &flow.client.local_addr()?.to_string(),
        &flow.client.peer_addr()?.to_string(),
    ] {
        assert!(shown.contains(part), "no {part}:\n{shown}");
    }
    Ok(())
}

#[test]
fn top_gives_the_terminal_back() -> Result<()> {
    let bed = Watched::start(&[])?;
    let top = format!(
        "{} top --interval 100ms --admin-socket {}",
        Daemon::command(&bed.topology.gateway, &[])?
            .get_program()
            .display(),
        bed.daemon.admin_socket().display()
    );
    // `script` gives it a terminal.
    let mut script = Command::new("script")
        .args(["-qec", &top, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut keys = script.stdin.take().context("a pipe")?;
    let mut output = script.stdout.take().context("a pipe")?;
    let reader = thread::spawn(move || {
        let mut shown = Vec::new();
        output.read_to_end(&mut shown).map(|_| shown)
    });
    // Any of these keys ends it once it reads them.
    eventually(PATIENCE, || {
        let _ = keys.write_all(b"q");
        script.try_wait().is_ok_and(|ended| ended.is_some())
    });
    assert!(script.wait()?.success());
    let shown = reader.join().expect("no panic")?;
    let shown = String::from_utf8_lossy(&shown);
    let (entered, left) = (shown.find("\x1b[?1049h"), shown.rfind("\x1b[?1049l"));
    assert!(entered.is_some() && left > entered, "{shown:?}");
    Ok(())
}
