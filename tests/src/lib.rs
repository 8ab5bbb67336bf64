//! The testbed of pepsal's end-to-end tests, demo and benchmarks.
//!
//! A [`Topology`] has client, gateway and server in separate [`Namespace`]s, optionally with a satellite link
//! of the [`Emulator`] between gateway and server. A [`Daemon`] runs the built `pepsal` in the gateway. A
//! [`Transfer`] moves verified bytes between client and [`Server`]; a [`Connector`] and a [`Listener`] give
//! tests the sockets, and a [`SavedSyn`] shows the SYN that the server received. A [`Bed`] combines them, and
//! opens [`Connection`]s with their [`Path`].
//!
//! The testbed needs root. It ends when its values are dropped, or with the process: namespaces have no
//! names, and child processes end with the thread that started them.

mod bed;
mod capture;
mod counters;
mod course;
mod daemon;
mod datagrams;
mod delays;
mod emulator;
mod footprint;
mod handover;
mod hook;
mod leg;
mod netns;
pub mod packet;
mod shaper;
mod socket;
mod syn;
mod topology;
mod traffic;
mod wait;

pub use bed::{BOTH, Bed, Connection, LAN, Network, Side, receive_all, send_all, splits};
pub use capture::{Capture, Segment};
pub use counters::counters;
pub use course::{Course, Passage, Step};
pub use daemon::{Daemon, Exit};
pub use datagrams::{Datagram, Datagrams};
pub use delays::Delays;
pub use emulator::{DirectionCounters, DirectionDelays, Emulator, LinkCounters, LinkDelays, LinkProfile};
pub use footprint::Footprint;
pub use handover::Handovers;
pub use hook::{Hook, count_programs, detach_programs};
pub use leg::{Leg, is_listening};
pub use netns::Namespace;
pub use socket::{Accepted, Connector, Listener, reset};
pub use syn::{Path, SavedSyn};
pub use topology::{Builder, Family, Link, Topology};
pub use traffic::{Cancel, Direction, Outcome, Server, Session, Transfer};
pub use wait::{PATIENCE, eventually, patience};
