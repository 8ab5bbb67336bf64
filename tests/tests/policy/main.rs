//! What the host decides, holds: its firewall, NAT, limits, accounting and policy routing treat connections that pepsal
//! splits as they treat those that it only forwards.
//!
//! Every test describes a gateway in a [`Scenario`](scenario::Scenario), whose checks run twice: without a daemon, which
//! shows that the kernel does what the test says, and with one, where connections have to be split besides.

mod accounting;
mod filter;
mod nat;
mod neighbours;
mod routing;
mod scenario;
