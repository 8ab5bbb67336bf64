//! The links that operators describe.

pub mod budget;
pub mod learned;
pub mod profile;
pub mod rate_control;
