//! The testbed that pepsal's end-to-end tests, demo and benchmarks stand on.
//!
//! A [`Topology`] lays client, gateway and server out in [`Namespace`]s of their own, with a satellite link from the
//! [`Emulator`] between gateway and server where one is asked for. A [`Daemon`] runs the built `pepsal` in the gateway. A
//! [`Transfer`] moves verified bytes between client and [`Server`]; a [`Connector`] and a [`Listener`] give tests the
//! sockets themselves, and a [`SavedSyn`] shows what the server's kernel received. A [`Bed`] is all of these together, with a
//! [`Connection`] for each that it opens, and the [`Path`] by which that goes.
//!
//! All of it needs root, and all of it is gone when its values are dropped, or when the process dies, however it dies:
//! namespaces have no names, processes die with the thread that started them.

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
