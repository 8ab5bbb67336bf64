//! The commands that an operator types: what the daemon does ([`status`], [`flows`], [`top`]), and ending flows ([`close`]). They
//! ask the daemon over its admin socket ([`client`]). [`doctor`] asks the host.

pub mod client;
pub mod close;
pub mod doctor;
pub mod flows;
pub mod status;
pub mod text;
pub mod top;
