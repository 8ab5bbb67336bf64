//! Links: what an operator knows of one ([`spec`]), what follows for its legs ([`profile`]), and how they share its rate
//! ([`budget`]), which [`rate_control`] sends at. Where no link is described, a leg starts with what earlier ones [`learned`] of
//! its path.

pub mod budget;
pub mod learned;
pub mod profile;
pub mod rate_control;
pub mod registry;
pub mod spec;
