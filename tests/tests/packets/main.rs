//! Crafted packets through the programs as the kernel runs them: verdict, mark, counters and records.
//!
//! The programs pass every packet on, so what they decide shows in the mark, in the one counter that each packet moves
//! and in the map of flows.

mod daemon;
mod differential;
mod flow;
mod fragment;
mod frame;
mod gateway;
mod generator;
mod icmp;
mod malformed;
mod oracle;
mod rules;
mod subscriber;
mod syn;

const MSS_AND_MORE: [u8; 20] = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
