//! The command line: the daemon's options, and the commands.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::{config::options::Options, ctl};

/// A TCP performance enhancing proxy (RFC 3135) for satellite and other long links.
///
/// New TCP connections that arrive on the named interfaces are split on the gateway and relayed. Each leg is tuned for its
/// own link. eBPF steers the packets: no iptables or nftables rules are needed, and none stay in the host.
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
    /// The command; none runs the proxy.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The daemon's options.
    #[command(flatten)]
    pub daemon: Options,

    /// Print the version
    #[arg(short = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
}

/// The commands beside the daemon.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Check a configuration file, and print each error with its line and column
    Check {
        /// Configuration file
        #[arg(default_value = DEFAULT_FILE)]
        file: PathBuf,
    },
    /// Show attachments, counters, links and problems of the running daemon
    Status(ctl::status::Arguments),
    /// List the flows of the running daemon
    Flows(ctl::flows::Arguments),
    /// List the clients with flows in the running daemon, with the sums over the flows of each
    Clients(ctl::clients::Arguments),
    /// Show the flows of the running daemon live
    Top(ctl::top::Arguments),
    /// Reset flows of the running daemon
    Close(ctl::close::Arguments),
    /// Check this host for the requirements of pepsal, and print the commands that fix it
    Doctor(ctl::doctor::Arguments),
    /// Make a daemon reload its configuration; after an upgrade of the program, start the new version as its takeover
    Reload(ctl::reload::Arguments),
}

/// Path of the package's configuration file.
pub const DEFAULT_FILE: &str = "/etc/pepsal/pepsal.toml";

/// Returns the parser of the whole command line, for manual pages and completions.
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
