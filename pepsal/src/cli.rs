//! The command line: the daemon's options, and the commands beside them.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::{config::options::Options, ctl};

/// A TCP performance enhancing proxy (RFC 3135) for satellite and other long links.
///
/// New TCP connections that arrive on the named interfaces are split in two by the gateway and relayed, each leg tuned
/// for its own link. Steering is done by eBPF: no iptables, no nftables, and nothing stays behind.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "pepsal",
    version,
    disable_version_flag = true,
    disable_help_subcommand = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do instead of running the proxy.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to run the proxy, when there is no command.
    #[command(flatten)]
    pub daemon: Options,

    /// Print the version
    #[arg(short = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
}

/// What `pepsal` can do besides running the proxy.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Say what is wrong with a configuration file, and where
    Check {
        /// The file
        #[arg(default_value = DEFAULT_FILE)]
        file: PathBuf,
    },
    /// Show what the running daemon is attached to, how it is used, and what is missing
    Status(ctl::status::Arguments),
    /// List the flows of the running daemon
    Flows(ctl::flows::Arguments),
    /// List the clients that have flows of the running daemon, each with the sums over its flows
    Clients(ctl::clients::Arguments),
    /// Watch the flows of the running daemon live
    Top(ctl::top::Arguments),
    /// Reset flows of the running daemon
    Close(ctl::close::Arguments),
    /// Check this host for the requirements of pepsal, and print the commands that mend it
    Doctor(ctl::doctor::Arguments),
    /// Have a daemon read its configuration again; one whose program was replaced is followed by the new one, without a gap
    Reload(ctl::reload::Arguments),
}

/// Where the package puts the configuration.
pub const DEFAULT_FILE: &str = "/etc/pepsal/pepsal.toml";

/// The whole command line, for manual pages and completions.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::options;

    #[test]
    fn every_option_beside_the_commands_is_the_daemon_s() {
        let ids = |command: clap::Command| -> Vec<String> {
            let ids = command.get_arguments().map(|arg| arg.get_id().to_string());
            ids.filter(|id| id != "version").collect()
        };
        assert_eq!(ids(command()), ids(options::command()));
    }
}
