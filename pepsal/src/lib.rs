//! A TCP performance enhancing proxy (RFC 3135) that intercepts by eBPF.
//!
//! A flow, step by step:
//!
//! 1. The client's SYN arrives on an intercepted interface. There, in the [`wire`], an eBPF program finds it selected,
//!    records it, and redirects it to the namespace of the client legs before the host sees it. A second program
//!    assigns the connection to pepsal's listener.
//! 2. The [`daemon`] accepts the connection, and passes the flow to the worker thread with the fewest flows.
//! 3. The [`flow`] enters the flow table, and connects the server leg in the namespace of the server legs: a second
//!    connection, to the server, from the client's address, with its DSCP and options. The server leg's packets enter
//!    the host by the interface of the client's SYN, and are routed, filtered, counted and translated as the client's
//!    own; the replies are redirected to the leg where they would leave for the client.
//! 4. Each leg gets the profile of its [`link`], and a share of the link's rate. Without a profile, it starts with the
//!    learned parameters of its path.
//! 5. [`tcp`] sets the options of the legs' sockets.
//! 6. The flow relays the bytes in both directions, until both have ended or a leg fails.
//! 7. The end of the flow is counted once, with its close reason.
//! 8. [`observe`] serves flows, links and counters to Prometheus, and over a Unix socket to the commands in [`ctl`].
//!
//! The other rooms: [`host`] has the kernel's features and settings, [`units`] parses and formats rates, sizes and
//! times, [`config`] merges the configuration file and the daemon's options, the [`daemon`] starts, reloads and stops
//! the proxy, and [`cli`] is the command line.

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
