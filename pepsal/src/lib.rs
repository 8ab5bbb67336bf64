//! A TCP performance enhancing proxy (RFC 3135) that intercepts by eBPF.
//!
//! A flow, step by step:
//!
//! 1. The client's SYN enters an intercepted interface. There, in the [`wire`], an eBPF program finds it selected, records
//!    it, and redirects it to the namespace of the client legs before the host sees it. A second program gives the connection
//!    to pepsal's listener.
//! 2. The [`daemon`] accepts it, and gives the flow to the worker thread with the fewest flows.
//! 3. The [`flow`] takes its place in the table of flows, and connects the server leg in the namespace of the server legs: a
//!    second connection, to the server, from the client's address, with its DSCP and options. What that leg sends enters the
//!    host by the interface of the client's SYN, and is routed, filtered, counted and translated as the client's own; the
//!    answers are taken off the wire again where they would leave for the client.
//! 4. Each leg gets the profile of the [`link`] that it leaves through, and a share of the link's rate. Where no profile is
//!    given, it starts with what earlier legs learned of the path.
//! 5. The legs' sockets are set by [`tcp`].
//! 6. The flow relays the bytes both ways, until both directions are done or a leg breaks.
//! 7. It counts its end once, with the reason.
//! 8. [`observe`] shows flows, links and counters to Prometheus, and over a Unix socket to the commands in [`ctl`].
//!
//! Around them: [`host`] is this host's kernel, [`units`] reads and prints rates, sizes and times, [`config`] merges the
//! configuration file and the options of the daemon, the [`daemon`] starts, reloads and stops all of it, and [`cli`] is the
//! command line.

pub mod wire;
pub mod flow;
mod link;
pub mod tcp;
pub mod observe;
pub mod host;
mod units;
pub mod config;
pub mod daemon;
pub mod ctl;
pub mod cli;
