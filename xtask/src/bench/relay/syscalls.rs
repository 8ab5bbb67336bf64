//! Counts the system calls of a proxy per connection.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pepsal_tests::Family;

use super::{
    contender::Contender,
    end::Order,
    lane::Lane,
    observation::Metric,
    process::{self, Process},
    rounds::Bench,
};
use crate::{setup, shell};

const CONNECTIONS: usize = 2000;
const PATIENCE: Duration = Duration::from_secs(60);
/// Time after which the calls of the last connections are done.
const SETTLED: Duration = Duration::from_millis(500);

/// Counts the system calls of all contenders.
pub fn measure(bench: &mut Bench<'_>) -> Result<()> {
    setup::offer(&[("strace", "strace")]).context("--syscalls needs strace")?;
    for contender in bench.contenders {
        if *contender == Contender::Forwarding {
            continue;
        }
        bench.progress.show(|| format!("system calls: {contender}"));
        let mut lane = Lane::new(*contender, bench.equipment)?;
        let server = lane.server(Family::V4);
        // Opens one-time resources first.
        let order = |count| Order::ConnectTimes { server, count };
        lane.order(&order(200), PATIENCE)?;
        let pid = lane.proxy_pid().context("the proxy runs")?;
        // Not this thread's own command: its signals are blocked, and strace ends by one.
        let strace = lane
            .topology()
            .gateway
            .command(shell::find("strace").context("no strace")?);
        let summary = traced(bench, strace, pid, || {
            lane.order(&order(CONNECTIONS), PATIENCE).map(drop)
        })?;
        let calls = per_connection(&summary)?;
        let sum = calls.iter().map(|(_, count)| count).sum();
        bench.found.add(1, *contender, Metric::Syscalls, sum);
        bench.found.syscalls.push((*contender, calls));
    }
    Ok(())
}

/// Returns strace's summary of a process during an operation.
fn traced(
    bench: &Bench<'_>,
    mut command: Command,
    pid: u32,
    work: impl FnOnce() -> Result<()>,
) -> Result<String> {
    let file = std::env::temp_dir().join(format!("pepsal-bench-strace-{}", std::process::id()));
    command
        .args(["-c", "-f", "-S", "calls", "-p", &pid.to_string(), "-o"])
        .arg(&file);
    let mut strace = Process::start(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    )?;
    let signals = bench.equipment.signals;
    process::wait_until("strace is attached", PATIENCE, signals, || {
        strace.has_ended() || all_threads_traced(pid)
    })?;
    work()?;
    thread::sleep(SETTLED);
    let strace_pid = Pid::from_raw(strace.id().try_into().context("a pid is positive and small")?);
    kill(strace_pid, Signal::SIGINT).context("strace has ended")?;
    process::wait_until("strace ends", PATIENCE, signals, || strace.has_ended())?;
    let status = strace.child().wait()?;
    if !status.success() && status.signal() != Some(Signal::SIGINT as i32) {
        bail!("strace failed: {status}");
    }
    let summary = fs::read_to_string(&file).context("strace has written nothing");
    let _ = fs::remove_file(&file);
    summary
}

fn all_threads_traced(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.filter_map(Result::ok).all(|thread| {
        fs::read_to_string(thread.path().join("status")).is_ok_and(|status| {
            status
                .lines()
                .any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        })
    })
}

/// Returns the calls per connection by name, most frequent first, without those below a hundredth.
fn per_connection(summary: &str) -> Result<Vec<(String, f64)>> {
    let calls = calls(summary);
    if calls.is_empty() {
        bail!("strace has counted nothing");
    }
    let each = calls
        .into_iter()
        .map(|(name, count)| (name, count as f64 / CONNECTIONS as f64));
    let mut each: Vec<_> = each.filter(|(_, count)| *count >= 0.01).collect();
    each.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    Ok(each)
}

/// Parses lines of `% time, seconds, usecs/call, calls, errors (or nothing), syscall`.
fn calls(summary: &str) -> Vec<(String, u64)> {
    let call = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (name, count) = match words[..] {
            [_, _, _, count, name] | [_, _, _, count, _, name] => (name, count.parse().ok()?),
            _ => return None,
        };
        (name != "total").then(|| (name.to_owned(), count))
    };
    summary.lines().filter_map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strace_is_understood() {
        let summary = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 40.03    0.017233           4      4000      2000 splice
 20.00    0.008000           4      2000           close
  0.00    0.000000           0         3           brk
------ ----------- ----------- --------- --------- ----------------
100.00    0.043049           3      6003      2000 total
";
        let expected = [("splice", 4000), ("close", 2000), ("brk", 3)];
        assert_eq!(
            calls(summary),
            expected.map(|(name, count)| (name.to_owned(), count))
        );
        let each = per_connection(summary).unwrap();
        assert_eq!(each, [("splice".to_owned(), 2.0), ("close".to_owned(), 1.0)]);
        assert!(per_connection("").is_err());
    }
}
