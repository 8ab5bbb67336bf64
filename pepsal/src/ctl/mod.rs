//! The commands that an operator types: what the daemon does ([`status`], [`flows`], [`clients`], [`top`]), and ending flows
//! ([`close`]). They ask the daemon over its admin socket ([`client`]). [`doctor`] asks the host. [`reload`] is for service managers.

pub(crate) mod client;
pub mod clients;
pub mod close;
pub mod doctor;
pub mod flows;
pub mod reload;
pub mod status;
pub(crate) mod text;
pub mod top;
