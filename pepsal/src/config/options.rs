//! The daemon's options: PEPsal's, with the same letters, and pepsal's.

use std::{num::NonZeroU16, path::PathBuf, time::Duration};

use clap::{Args, Command};

use crate::{
    flow::{
        leg_config::LegOptions,
        replicate::{Replicate, Source},
    },
    link::spec::LinkSpec,
    observe::{http::Place, log::LogLevel},
    tcp::congestion::Congestion,
    wire::{claims, mark::Mark, selection::Rule},
};

/// Options of the daemon.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Configuration file for options that are not on the command line; SIGHUP reloads it
    #[arg(short = 'F', long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Intercept new TCP connections that arrive on this interface (repeatable). Name every interface on which packets of
    /// clients arrive
    #[arg(
        short = 'i',
        long = "interface",
        value_name = "INTERFACE",
        required_unless_present_any = ["explain", "config"]
    )]
    pub interfaces: Vec<String>,

    /// Profile of the link behind an interface (repeatable): its rate and round-trip time, from which pepsal derives windows,
    /// buffers, pacing and timeouts of every leg that leaves through it. Other keys: up (the rate in the direction from this
    /// gateway), cc, iw, pacing, rcvbuf, sndbuf, unsent, mss, rto-min, rto-max, user-timeout, keepalive, connect-timeout,
    /// weights=equal|dscp, share=subscriber|leg, peer=pepsal
    #[arg(long = "link", value_name = "INTERFACE,rate=RATE,rtt=TIME[,KEY=VALUE…]")]
    pub links: Vec<LinkSpec>,

    /// Print the profile that is derived from each --link, with the source of every value, and exit
    #[arg(long)]
    pub explain: bool,

    /// Run in the background once ready
    #[arg(short = 'd', long)]
    pub daemon: bool,

    /// Take over from the instance that intercepts on these interfaces, without a gap: this instance gets the new connections,
    /// the other one drains and exits. Both need the same mark. Without another instance, this is an ordinary start
    #[arg(long)]
    pub takeover: bool,

    /// Log level debug, or trace (-vv); RUST_LOG overrides it
    #[arg(short = 'v', long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Log level; RUST_LOG overrides it
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "info",
        conflicts_with = "verbose"
    )]
    pub log_level: LogLevel,

    /// TCP port of the listeners, in the network namespace of the client legs
    #[arg(
        short = 'p',
        long,
        value_name = "PORT",
        default_value = "5000",
        value_parser = port,
        help_heading = "Proxy"
    )]
    pub port: NonZeroU16,

    /// Maximum number of connections; further ones are not intercepted
    #[arg(
        short = 'c',
        long = "max-connections",
        alias = "conns",
        value_name = "N",
        default_value_t = 2112,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000),
        help_heading = "Proxy"
    )]
    pub max_connections: u32,

    /// Maximum number of connections of one client, by its IPv4 address or the /64 of its IPv6 address; further ones are not
    /// intercepted; 0 for no limit
    #[arg(
        long = "conns-per-client",
        value_name = "N",
        default_value_t = 0,
        value_parser = connections_per_client,
        help_heading = "Proxy"
    )]
    pub max_connections_per_client: u32,

    /// Append the flow table to this file every five minutes
    #[arg(short = 'l', long, value_name = "LOGFILE", help_heading = "Proxy")]
    pub logfile: Option<PathBuf>,

    /// Interval at which expired pending connections are reset (seconds, or with a unit)
    #[arg(
        short = 'g',
        long,
        alias = "gc_interval",
        value_name = "INTERVAL",
        default_value = "15h",
        value_parser = duration,
        help_heading = "Proxy"
    )]
    pub gc_interval: Duration,

    /// Lifetime of a pending connection, whose server leg is not connected yet (seconds, or with a unit)
    #[arg(
        short = 't',
        long = "pending-timeout",
        alias = "plifetime",
        value_name = "DURATION",
        default_value = "5h",
        value_parser = duration,
        help_heading = "Proxy"
    )]
    pub pending_lifetime: Duration,

    /// Worker threads [default: one per core]
    #[arg(
        short = 'T',
        long,
        value_name = "THREADS",
        value_parser = clap::value_parser!(u16).range(1..=1024),
        help_heading = "Proxy"
    )]
    pub threads: Option<u16>,

    /// Process that gets SIGUSR1 when 99 % of -c connections are in use, and SIGUSR2 when 95 % are in use again
    #[arg(
        short = 'M',
        long = "monitoring-pid",
        value_name = "PID",
        value_parser = clap::value_parser!(i32).range(1..),
        help_heading = "Proxy"
    )]
    pub monitoring_pid: Option<i32>,

    /// Run as this user, with the required capabilities; this user needs access to all files and sockets
    #[arg(long, value_name = "NAME", help_heading = "Proxy")]
    pub user: Option<String>,

    /// Directory of the lock files by which instances claim interfaces; all instances of a host need the same
    #[arg(
        long,
        value_name = "PATH",
        default_value = claims::RUNTIME_DIRECTORY,
        help_heading = "Proxy"
    )]
    pub runtime_dir: PathBuf,

    /// Time until a server leg is connected; after it the client's connection is reset
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = some_time, help_heading = "Proxy")]
    pub connect_timeout: Duration,

    /// Time without data after which an open flow is reset; 0 disables it
    #[arg(long, value_name = "DURATION", default_value = "1day", value_parser = duration, help_heading = "Proxy")]
    pub idle_timeout: Duration,

    /// Time for open flows to end after SIGTERM or SIGINT; after it they are reset
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, help_heading = "Proxy")]
    pub drain_timeout: Duration,

    /// Listen address of the metrics endpoint: ADDRESS:PORT, unix:/PATH, or none [default: 127.0.0.1:9300]
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability")]
    pub metrics_listen: Option<Place>,

    /// Unix socket for the commands status, flows, clients, top and close, or none [default: /run/pepsal/pepsal.sock]
    #[arg(long, value_name = "PATH", help_heading = "Observability")]
    pub admin_socket: Option<PathBuf>,

    /// Options of selection, steering and replication.
    #[command(flatten)]
    pub steering: SteeringOptions,

    /// Socket options of the legs.
    #[command(flatten)]
    pub tcp: TcpArgs,

    /// Ignored, accepted for compatibility with PEPsal: no sniffer is needed
    #[arg(
        short = 's',
        long = "sniff-interface",
        value_name = "INTERFACE",
        help_heading = "Proxy"
    )]
    pub sniff_interface: Option<String>,
}

impl Options {
    /// Returns the log level of -v or --log-level.
    pub fn level(&self) -> LogLevel {
        match self.verbose {
            0 => self.log_level,
            1 => LogLevel::Debug,
            _ => LogLevel::Trace,
        }
    }

    /// Returns the options for legs.
    pub fn legs(&self) -> LegOptions {
        let (steering, tcp) = (&self.steering, &self.tcp);
        LegOptions {
            source: steering.source,
            replicate: steering.replicate.clone(),
            fastopen: tcp.fastopen,
            quickack: tcp.quickack,
            cork: tcp.cork,
            mss: tcp.mss,
            congestion: tcp.congestion.clone(),
            client_congestion: tcp.client_congestion.clone(),
            server_congestion: tcp.server_congestion.clone(),
        }
    }
}

/// Returns the parser of the daemon's options, without the commands.
pub fn command() -> Command {
    Options::augment_args(Command::new("pepsal"))
}

/// Options of selection, steering and replication.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Steering")]
pub struct SteeringOptions {
    /// Intercept only connections that match a rule (repeatable): [dst=|src=]PREFIX[:PORTS], port=PORTS,
    /// [IPv6]:PORTS; PORTS is 80 or 8000-8099. Destination, source and port match independently; the longest
    /// prefix, then the narrowest range, wins
    #[arg(long, value_name = "RULE")]
    pub only: Vec<Rule>,

    /// Do not intercept connections that match a rule (repeatable); the syntax is that of --only
    #[arg(long, value_name = "RULE")]
    pub bypass: Vec<Rule>,

    /// File with rules for --only, one per line (repeatable)
    #[arg(long, value_name = "FILE")]
    pub only_from: Vec<PathBuf>,

    /// File with rules for --bypass, one per line (repeatable)
    #[arg(long, value_name = "FILE")]
    pub bypass_from: Vec<PathBuf>,

    /// Packet mark of server legs' packets until they enter the host, where it is cleared; MASK has the bits that pepsal uses
    #[arg(long, value_name = "VALUE[/MASK]", default_value = "0x10000000/0x10000000")]
    pub mark: Mark,

    /// Refused: pepsal adds no routes to the host
    #[arg(long, value_name = "NUMBER", hide = true, value_parser = removed_table)]
    table: Option<u32>,

    /// Source address of server legs: the client's, or the gateway's (an ordinary socket of the host)
    #[arg(long, value_name = "ADDRESS", default_value = "client")]
    pub source: Source,

    /// Header fields of the client's SYN that are copied to the server leg
    #[arg(
        long,
        value_name = "FIELD",
        value_delimiter = ',',
        default_value = "dscp,options"
    )]
    pub replicate: Vec<Replicate>,

    /// Log every intercepted SYN, from the eBPF program
    #[arg(long)]
    pub log_syns: bool,
}

/// Options of the legs' sockets.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "TCP")]
pub struct TcpArgs {
    /// Enable TCP fast open on the listeners and the server legs
    #[arg(short = 'f', long)]
    pub fastopen: bool,

    /// Disable delayed acknowledgements (TCP_QUICKACK)
    #[arg(short = 'q', long)]
    pub quickack: bool,

    /// Disable Nagle's algorithm (TCP_NODELAY), which is the default
    #[arg(short = 'n', long)]
    pub nodelay: bool,

    /// Send full segments only, for up to 200 ms (TCP_CORK)
    #[arg(short = 'k', long, conflicts_with = "nodelay")]
    pub cork: bool,

    /// Congestion control of both legs; its kernel module is loaded if necessary
    #[arg(
        short = 'C',
        long = "congestion-algo",
        alias = "congestion",
        value_name = "ALGORITHM"
    )]
    pub congestion: Option<Congestion>,

    /// Congestion control of the client legs
    #[arg(long, value_name = "ALGORITHM")]
    pub client_congestion: Option<Congestion>,

    /// Congestion control of the server legs
    #[arg(long, value_name = "ALGORITHM")]
    pub server_congestion: Option<Congestion>,

    /// Maximum segment size in bytes
    #[arg(
        short = 'm',
        long = "max-segment-size",
        value_name = "MSS",
        value_parser = clap::value_parser!(u16).range(88..=32767)
    )]
    pub mss: Option<u16>,
}

fn port(text: &str) -> Result<NonZeroU16, String> {
    text.parse()
        .map_err(|_| format!("'{text}' is not a port: give a number from 1 to 65535"))
}

fn connections_per_client(text: &str) -> Result<u32, String> {
    let number = text.parse().ok();
    number
        .filter(|number| *number <= 1_000_000)
        .ok_or_else(|| format!("'{text}' is no number of connections: give 1 to 1000000, or 0 for no bound"))
}

/// The error message of the removed option `--table`.
pub const TABLE_REMOVED: &str =
    "flows stay in the forwarding path of the host and need no routing table: leave it out";

fn removed_table(_: &str) -> Result<u32, String> {
    Err(TABLE_REMOVED.to_owned())
}

/// Parses a time other than zero.
fn some_time(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err(format!("'{text}' is too short: give a time above 0")),
        time => Ok(time),
    }
}

/// Parses a time: seconds without a unit, as in PEPsal, or a number with a unit.
fn duration(text: &str) -> Result<Duration, String> {
    if text.bytes().all(|b| b.is_ascii_digit())
        && let Ok(seconds) = text.parse::<u32>()
    {
        return Ok(Duration::from_secs(seconds.into()));
    }
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= Duration::from_secs(u32::MAX.into()) => Ok(duration),
        _ => Err(format!(
            "'{text}' is not a time: give seconds, or a number with a unit like 90s, 5min, 15h"
        )),
    }
}
