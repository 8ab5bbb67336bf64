//! The commands of the operator: the state of the daemon ([`status`], [`flows`], [`clients`], [`top`]) and the reset of flows ([`close`]),
//! by the admin socket ([`client`]). [`doctor`] checks the host. [`reload`] is for service managers.

pub(crate) mod client;
pub mod clients;
pub mod close;
pub mod doctor;
pub mod flows;
pub mod reload;
pub mod status;
pub(crate) mod text;
pub mod top;
