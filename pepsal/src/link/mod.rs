//! Links: what an operator knows of one ([`spec`]), what follows for its legs ([`profile`]), and how they share its rate
//! ([`budget`]), which [`rate_control`] sends at. Where no link is described, a leg starts with what earlier ones [`learned`] of
//! its path.

pub(crate) mod budget;
pub(crate) mod learned;
pub(crate) mod profile;
pub(crate) mod rate_control;
pub(crate) mod registry;
pub(crate) mod spec;
