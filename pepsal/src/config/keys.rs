//! The keys of the configuration file. Each corresponds to an option, whose parser reads its value.

#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    /// With its table, like `proxy.port`.
    pub name: &'static str,
    /// The field of [`Options`](crate::config::options::Options).
    pub option: &'static str,
    /// Time at which a changed value applies.
    pub applies: Applies,
}

/// Time at which a changed value applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applies {
    /// At a reload.
    Live,
    /// At the next start.
    AtStart,
}

const fn key(name: &'static str, option: &'static str, applies: Applies) -> Key {
    Key {
        name,
        option,
        applies,
    }
}

use Applies::{AtStart, Live};

/// All keys except those of links, in the order of the documentation.
pub const KEYS: &[Key] = &[
    key("interfaces", "interfaces", AtStart),
    key("daemon", "daemon", AtStart),
    key("log.level", "log_level", Live),
    key("proxy.port", "port", AtStart),
    key("proxy.max-connections", "max_connections", AtStart),
    key("proxy.conns-per-client", "max_connections_per_client", AtStart),
    key("proxy.threads", "threads", AtStart),
    key("proxy.logfile", "logfile", AtStart),
    key("proxy.monitoring-pid", "monitoring_pid", AtStart),
    key("proxy.user", "user", AtStart),
    key("proxy.runtime-dir", "runtime_dir", AtStart),
    key("proxy.gc-interval", "gc_interval", Live),
    key("proxy.pending-timeout", "pending_lifetime", Live),
    key("proxy.connect-timeout", "connect_timeout", Live),
    key("proxy.idle-timeout", "idle_timeout", Live),
    key("proxy.drain-timeout", "drain_timeout", Live),
    key("steering.only", "only", Live),
    key("steering.only-from", "only_from", Live),
    key("steering.bypass", "bypass", Live),
    key("steering.bypass-from", "bypass_from", Live),
    key("steering.source", "source", Live),
    key("steering.replicate", "replicate", Live),
    key("steering.mark", "mark", AtStart),
    key("steering.log-syns", "log_syns", AtStart),
    key("tcp.congestion", "congestion", Live),
    key("tcp.client-congestion", "client_congestion", Live),
    key("tcp.server-congestion", "server_congestion", Live),
    key("tcp.max-segment-size", "mss", Live),
    key("tcp.fastopen", "fastopen", Live),
    key("tcp.quickack", "quickack", Live),
    key("tcp.nodelay", "nodelay", Live),
    key("tcp.cork", "cork", Live),
    key("metrics.listen", "metrics_listen", AtStart),
    key("admin.socket", "admin_socket", AtStart),
];

/// Removed keys, with the message for each.
pub const REMOVED: &[(&str, &str)] = &[("steering.table", crate::config::options::TABLE_REMOVED)];

/// The table of links: `[link.sat0]`.
pub const LINK: &str = "link";

/// The field of [`Options`](crate::config::options::Options) for links.
pub const LINKS: &str = "links";

/// Returns the key of this name.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Returns the table of each key.
pub fn tables() -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter_map(|key| Some(key.name.split_once('.')?.0))
}

/// Returns the known name most similar to a misspelt one, also of another table.
pub fn suggest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = name.to_ascii_lowercase().replace('_', "-");
    let (table, written) = plain.rsplit_once('.').unwrap_or(("", &plain));
    let likeness = |candidate: &'a str| {
        let (own, part) = candidate.rsplit_once('.').unwrap_or(("", candidate));
        // Jaro-Winkler weighs common prefixes, Damerau-Levenshtein transposed letters.
        let nearly = strsim::damerau_levenshtein(written, part) <= 1;
        let likeness = strsim::jaro_winkler(written, part).max(if nearly { 0.9 } else { 0.0 });
        (likeness + if own == table { 0.05 } else { 0.0 }, candidate)
    };
    let alike = known
        .into_iter()
        .map(likeness)
        .filter(|(likeness, _)| *likeness > 0.85);
    alike
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::options;

    /// Options without a key.
    const COMMAND_LINE_ONLY: [&str; 9] = [
        "command",
        "config",
        "explain",
        "verbose",
        "version",
        "help",
        "sniff_interface",
        "takeover",
        "table",
    ];

    #[test]
    fn every_option_has_a_key_and_every_key_an_option() {
        let command = options::command();
        let options: Vec<&str> = command.get_arguments().map(|arg| arg.get_id().as_str()).collect();
        for key in KEYS {
            assert!(options.contains(&key.option), "{} stands for no option", key.name);
        }
        for option in options {
            assert!(
                option == LINKS
                    || COMMAND_LINE_ONLY.contains(&option)
                    || KEYS.iter().any(|key| key.option == option),
                "{option} has no key in the configuration file"
            );
        }
    }

    #[test]
    fn misspelt_names_are_recognised() {
        let names = || KEYS.iter().map(|key| key.name).chain(tables());
        for (wrong, right) in [
            ("interface", Some("interfaces")),
            ("interfases", Some("interfaces")),
            ("port", Some("proxy.port")),
            ("prot", Some("proxy.port")),
            ("connect_timeout", Some("proxy.connect-timeout")),
            ("steering.bypas", Some("steering.bypass")),
            ("zzz", None),
            ("tpc", Some("tcp")),
        ] {
            assert_eq!(suggest(wrong, names()), right, "{wrong}");
        }
    }
}
