//! Links: what an operator knows of one ([`spec`]), what follows for its legs ([`profile`]), what it carries at present
//! ([`controller`]), and how they share that ([`budget`], [`division`], [`backoff`]), which [`rate_control`] sends at. Where no link is described, a leg starts with what earlier ones [`learned`] of
//! its path.

mod backoff;
pub(crate) mod budget;
pub(crate) mod controller;
pub mod division;
pub(crate) mod learned;
pub(crate) mod profile;
pub(crate) mod rate_control;
pub(crate) mod registry;
pub(crate) mod spec;
