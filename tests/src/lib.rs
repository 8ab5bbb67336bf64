//! The testbed that pepsal's end-to-end tests, demo and benchmarks stand on.
//!
//! A [`Topology`] lays client, gateway and server out in [`Namespace`]s of their own, with a satellite link from the
//! [`Emulator`] between gateway and server where one is asked for. A [`Daemon`] runs the built `pepsal` in the gateway. A
//! [`Transfer`] moves verified bytes between client and [`Server`]; a [`Connector`] and a [`Listener`] give tests the
//! sockets themselves, and a [`SavedSyn`] shows what the server's kernel received.
//!
//! All of it needs root, and all of it is gone when its values are dropped, or when the process dies, however it dies:
//! namespaces have no names, processes die with the thread that started them.

mod daemon;
mod emulator;
mod footprint;
mod netns;
mod socket;
mod syn;
mod topology;
mod traffic;
mod wait;

pub use daemon::{Daemon, Exit};
pub use emulator::{DirectionCounters, Emulator, LinkCounters, LinkProfile};
pub use footprint::Footprint;
pub use netns::Namespace;
pub use socket::{Accepted, Connector, Listener, reset};
pub use syn::SavedSyn;
pub use topology::{Builder, Family, Link, Topology};
pub use traffic::{Direction, Outcome, Server, Transfer};
pub use wait::eventually;
