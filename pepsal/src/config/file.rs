//! Converts the text of a configuration file to command-line arguments.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use clap::{ArgAction, Command, error::ErrorKind};
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue},
};

use crate::{
    config::{
        keys::{self, KEYS, Key, LINK, LINKS},
        options,
        problem::{Problem, Text},
    },
    link::spec::{self, Draft},
};

#[derive(Debug, PartialEq, Eq)]
pub struct Given {
    /// The field of [`Options`](crate::config::options::Options).
    pub option: &'static str,
    /// Equivalent command-line arguments.
    pub arguments: Vec<String>,
    name: String,
    /// Byte offset of the key in the text.
    at: usize,
}

/// Parses the text of a file.
///
/// # Errors
/// All errors of the text, in order.
pub fn read(file: &Path, content: &str) -> Result<Vec<Given>, Vec<Problem>> {
    let mut reader = Reader {
        text: Text::new(file, content),
        command: options::command().no_binary_name(true),
        given: Vec::new(),
        problems: Vec::new(),
    };
    let (document, errors) = DeTable::parse_recoverable(content);
    for error in errors {
        let span = error.span().unwrap_or_default();
        let what = match error.message() {
            "duplicate key" => format!(
                "'{}' is given twice",
                content.get(span.clone()).unwrap_or_default()
            ),
            message => format!("not TOML: {message}"),
        };
        reader.problem(span.start, &what);
    }
    reader.document(document.get_ref());
    reader.contradictions();
    reader.problems.sort_by_key(|(at, _)| *at);
    // After a syntax error the parser may report the same position again.
    reader.problems.dedup_by_key(|(at, _)| *at);
    match reader.problems.is_empty() {
        true => Ok(reader.given),
        false => Err(reader.problems.into_iter().map(|(_, problem)| problem).collect()),
    }
}

/// Returns whether two options exclude each other.
pub fn exclude_each_other(command: &Command, one: &str, other: &str) -> bool {
    let excludes = |one: &str, other: &str| {
        let arg = command.get_arguments().find(|arg| arg.get_id() == one);
        arg.is_some_and(|arg| {
            let excluded = command.get_arg_conflicts_with(arg);
            excluded.iter().any(|arg| arg.get_id() == other)
        })
    };
    excludes(one, other) || excludes(other, one)
}

struct Reader<'a> {
    text: Text<'a>,
    command: Command,
    given: Vec<Given>,
    problems: Vec<(usize, Problem)>,
}

impl Reader<'_> {
    fn problem(&mut self, at: usize, what: &str) {
        self.problems.push((at, self.text.problem(at, what)));
    }

    fn document(&mut self, document: &DeTable<'_>) {
        for (name, value) in document {
            let (at, name) = (name.span().start, &**name.get_ref());
            match value.get_ref() {
                value if name == LINK => self.links(at, value),
                DeValue::Table(table) if keys::tables().any(|known| known == name) => self.table(name, table),
                _ if keys::tables().any(|known| known == name) => {
                    self.problem(at, &format!("{name} is a table: write [{name}] above its keys"));
                }
                _ => self.key(at, name, value),
            }
        }
    }

    fn table(&mut self, table: &str, entries: &DeTable<'_>) {
        for (name, value) in entries {
            self.key(name.span().start, &format!("{table}.{}", name.get_ref()), value);
        }
    }

    fn key(&mut self, at: usize, name: &str, value: &Spanned<DeValue<'_>>) {
        let Some(key) = keys::find(name) else {
            return match keys::REMOVED.iter().find(|(removed, _)| *removed == name) {
                Some((_, why)) => self.problem(at, &format!("{name}: {why}")),
                None => self.unknown(at, name),
            };
        };
        match self.arguments(key, value) {
            // `false` has no argument.
            Some(arguments) if !arguments.is_empty() => self.given.push(Given {
                option: key.option,
                arguments,
                name: name.to_owned(),
                at,
            }),
            _ => {}
        }
    }

    /// Returns the command-line arguments of a key and its value; `None` after a recorded problem.
    fn arguments(&mut self, key: &'static Key, value: &Spanned<DeValue<'_>>) -> Option<Vec<String>> {
        let arg = self
            .command
            .get_arguments()
            .find(|arg| arg.get_id() == key.option);
        let arg = arg.expect("a test compares keys and options");
        let long = arg.get_long().expect("every option has a long name").to_owned();
        let has_default = !arg.get_default_values().is_empty();
        let typed = |text: String| format!("--{long}={text}");
        let what = match (arg.get_action(), value.get_ref()) {
            (ArgAction::SetTrue, DeValue::Boolean(true)) => return Some(vec![format!("--{long}")]),
            (ArgAction::SetTrue, DeValue::Boolean(false)) => return Some(Vec::new()),
            (ArgAction::SetTrue, _) => "true or false is expected",
            (ArgAction::Append, DeValue::Array(array)) if array.is_empty() && has_default => {
                "the list is empty: give a value, or leave the key out"
            }
            (ArgAction::Append, DeValue::Array(array)) => {
                return Some(self.list(key, &long, array).into_iter().map(typed).collect());
            }
            (ArgAction::Append, _) => {
                "a list is expected: write [ ] around its values, and commas between them"
            }
            _ => return self.valid(key, &long, value).map(|text| vec![typed(text)]),
        };
        self.problem(value.span().start, &format!("{}: {what}", key.name));
        None
    }

    fn list(&mut self, key: &Key, long: &str, array: &DeArray<'_>) -> Vec<String> {
        let (mut texts, mut seen) = (Vec::new(), HashSet::new());
        for item in array {
            let Some(text) = self.valid(key, long, item) else {
                continue;
            };
            if !seen.insert(text.clone()) {
                self.problem(
                    item.span().start,
                    &format!("{}: '{text}' is given twice", key.name),
                );
            }
            texts.push(text);
        }
        texts
    }

    /// Returns the text of a value, if its option accepts it.
    fn valid(&mut self, key: &Key, long: &str, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let at = value.span().start;
        let Some(text) = scalar(value.get_ref()) else {
            let kind = kind(value.get_ref());
            self.problem(
                at,
                &format!("{}: {kind} where a string or a number is expected", key.name),
            );
            return None;
        };
        if text.is_empty() {
            self.problem(
                at,
                &format!("{} is empty: give a value, or leave the key out", key.name),
            );
            return None;
        }
        // --explain needs no other option.
        let argument = format!("--{long}={text}");
        match self.command.try_get_matches_from_mut(["--explain", &argument]) {
            Ok(_) => Some(text),
            Err(error) => {
                self.problem(at, &format!("{}: {}", key.name, complaint(&error, &text)));
                None
            }
        }
    }

    fn unknown(&mut self, at: usize, name: &str) {
        let names = KEYS
            .iter()
            .map(|key| key.name)
            .chain(keys::tables())
            .chain([LINK]);
        self.problem(
            at,
            &format!("unknown key '{name}'{}", did_you_mean(keys::suggest(name, names))),
        );
    }

    fn links(&mut self, at: usize, links: &DeValue<'_>) {
        let DeValue::Table(links) = links else {
            return self.problem(at, "link: write a table for each interface, like [link.sat0]");
        };
        for (interface, keys) in links {
            let (at, interface) = (interface.span().start, &**interface.get_ref());
            match keys.get_ref() {
                DeValue::Table(keys) => self.link(at, interface, keys),
                _ => {
                    let what = format!(
                        "link.{interface} is a table: write a table for each interface, like [link.sat0]"
                    );
                    self.problem(at, &what);
                }
            }
        }
    }

    fn link(&mut self, at: usize, interface: &str, entries: &DeTable<'_>) {
        let before = self.problems.len();
        let mut draft = Draft::new(interface);
        let mut argument = format!("--link={interface}");
        let mut positions = HashMap::new();
        for (key, value) in entries {
            let (key_at, key) = (key.span().start, &**key.get_ref());
            let value_at = value.span().start;
            positions.insert(key.to_owned(), value_at);
            if !spec::KEYS.contains(&key) {
                let meant = keys::suggest(key, spec::KEYS).map(|key| format!("link.{interface}.{key}"));
                let hint = did_you_mean(meant.as_deref());
                self.problem(key_at, &format!("unknown key 'link.{interface}.{key}'{hint}"));
                continue;
            }
            let Some(text) = scalar(value.get_ref()) else {
                let kind = kind(value.get_ref());
                self.problem(
                    value_at,
                    &format!("link.{interface}.{key}: {kind} where a string or a number is expected"),
                );
                continue;
            };
            if let Err(what) = draft.set(key, &text) {
                self.problem(value_at, &format!("link.{interface}.{what}"));
            }
            argument.push_str(&format!(",{key}={text}"));
        }
        if self.problems.len() > before {
            return;
        }
        if let Err(fault) = draft.finish() {
            let at = positions.get(fault.key).copied().unwrap_or(at);
            return self.problem(at, &format!("link.{interface}: {}", fault.what));
        }
        match self.command.try_get_matches_from_mut(["--explain", &argument]) {
            Ok(_) => self.given.push(Given {
                option: LINKS,
                arguments: vec![argument],
                name: format!("link.{interface}"),
                at,
            }),
            Err(error) => self.problem(at, &format!("link.{interface}: {}", complaint(&error, interface))),
        }
    }

    fn contradictions(&mut self) {
        let mut found = Vec::new();
        for (i, one) in self.given.iter().enumerate() {
            for other in &self.given[..i] {
                if exclude_each_other(&self.command, one.option, other.option) {
                    let (first, second) = if one.at < other.at {
                        (one, other)
                    } else {
                        (other, one)
                    };
                    let what = format!(
                        "{} contradicts {}: leave one of them out",
                        second.name, first.name
                    );
                    found.push((second.at, what));
                }
            }
        }
        for (at, what) in found {
            self.problem(at, &what);
        }
    }
}

fn did_you_mean(name: Option<&str>) -> String {
    name.map_or(String::new(), |name| format!(": did you mean '{name}'?"))
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// Returns clap's error about a value, without clap's reference to the command line.
fn complaint(error: &clap::Error, value: &str) -> String {
    let source = std::error::Error::source(error);
    match (error.kind(), source) {
        (ErrorKind::ValueValidation, Some(source)) if source.is::<std::num::ParseIntError>() => {
            format!("'{value}' is not an integer in range")
        }
        (ErrorKind::ValueValidation, Some(source)) => source.to_string(),
        (ErrorKind::InvalidValue, _) => {
            use clap::error::{ContextKind, ContextValue};
            match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(valid)) => format!("'{value}' is not one of {}", valid.join(", ")),
                _ => format!("'{value}' is not a valid value"),
            }
        }
        _ => error.to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(content: &str) -> Vec<String> {
        let problems = read(Path::new("p.toml"), content).err().unwrap_or_default();
        problems.iter().map(Problem::to_string).collect()
    }

    #[test]
    fn each_kind_of_mistake_says_where_it_is_and_what_to_do() {
        for (content, complaint) in [
            ("interfaces = [\"lan0\"", "p.toml:1:21: not TOML: "),
            (
                "interfases = []",
                "p.toml:1:1: unknown key 'interfases': did you mean 'interfaces'?",
            ),
            (
                "port = 1",
                "p.toml:1:1: unknown key 'port': did you mean 'proxy.port'?",
            ),
            (
                "[proxi]\nport = 1",
                "p.toml:1:2: unknown key 'proxi': did you mean 'proxy'?",
            ),
            (
                "[proxy]\nprot = 1",
                "p.toml:2:1: unknown key 'proxy.prot': did you mean 'proxy.port'?",
            ),
            (
                "[proxy]\nmark = 1",
                "p.toml:2:1: unknown key 'proxy.mark': did you mean 'steering.mark'?",
            ),
            ("colour = 1", "p.toml:1:1: unknown key 'colour'"),
            (
                "proxy = 5000",
                "p.toml:1:1: proxy is a table: write [proxy] above its keys",
            ),
            (
                "daemon = \"yes\"",
                "p.toml:1:10: daemon: true or false is expected",
            ),
            (
                "interfaces = \"lan0\"",
                "p.toml:1:14: interfaces: a list is expected: write [ ] around",
            ),
            (
                "interfaces = [1.5]",
                "p.toml:1:15: interfaces: a float where a string or a number is expected",
            ),
            (
                "interfaces = [\"a\", \"a\"]",
                "p.toml:1:20: interfaces: 'a' is given twice",
            ),
            (
                "proxy.port = [1]",
                "p.toml:1:14: proxy.port: a list where a string or a number is expected",
            ),
            (
                "proxy.port = 70000",
                "p.toml:1:14: proxy.port: '70000' is not a port: give a number from 1",
            ),
            (
                "proxy.max-connections = 0",
                "p.toml:1:25: proxy.max-connections: 0 is not in 1..=1000000",
            ),
            (
                "proxy.threads = \"x\"",
                "p.toml:1:17: proxy.threads: 'x' is not an integer in range",
            ),
            (
                "proxy.idle-timeout = \"3 weeeks\"",
                "p.toml:1:22: proxy.idle-timeout: '3 weeeks' is not a time",
            ),
            (
                "proxy.logfile = \"\"",
                "p.toml:1:17: proxy.logfile is empty: give a value, or leave the key out",
            ),
            (
                "steering.source = \"me\"",
                "p.toml:1:19: steering.source: 'me' is not one of client, gateway",
            ),
            (
                "steering.replicate = []",
                "p.toml:1:22: steering.replicate: the list is empty",
            ),
            (
                "steering.only = [\"10.0.0.0/33\"]",
                "p.toml:1:18: steering.only: '10.0.0.0/33' is not an IPv4",
            ),
            (
                "tcp.cork = true\ntcp.nodelay = true",
                "p.toml:2:5: tcp.nodelay contradicts tcp.cork: leave one",
            ),
            (
                "[[link]]\nrate = \"5mbit\"",
                "p.toml:1:3: link: write a table for each interface, like [link.sat0]",
            ),
            (
                "[link]\nrate = \"5mbit\"",
                "p.toml:2:1: link.rate is a table: write a table for each interface",
            ),
            (
                "[link.sat0]\nrate = \"5\"\nrtt = \"1s\"",
                "p.toml:2:8: link.sat0.rate: '5' is not a rate: give",
            ),
            (
                "[link.sat0]\nrate = 5.5\nrtt = \"1s\"",
                "p.toml:2:8: link.sat0.rate: a float where a string",
            ),
            (
                "[link.sat0]\nrate = \"5mbit\"",
                "p.toml:1:7: link.sat0: rtt is missing",
            ),
            (
                "[link.sat0]\nrtd = \"1s\"",
                "p.toml:2:1: unknown key 'link.sat0.rtd': did you mean 'link.sat0.rtt'?",
            ),
            (
                "[link.s]\nrate = \"5mbit\"\nrtt = \"1s\"\npacing = \"9mbit\"",
                "p.toml:4:10: link.s: pacing is more than the link's 5 Mbit/s",
            ),
            (
                "[link.s]\nrate = \"5mbit\"\nrtt = \"1s\"\n[link.s]\nrate = \"9mbit\"",
                "p.toml:4:7: 's' is given twice",
            ),
        ] {
            let found = problems(content);
            assert!(
                found.iter().any(|line| line.starts_with(complaint)),
                "{content:?}: {found:?}"
            );
        }
    }

    #[test]
    fn all_mistakes_are_found_at_once_and_told_in_their_order() {
        let found = problems("[tcp]\ncorc = true\n[proxy]\nport = 0\nthreads = 0\n[link.x]\n");
        let lines: Vec<&str> = found
            .iter()
            .map(|problem| problem.split(':').nth(1).unwrap())
            .collect();
        assert_eq!(lines, ["2", "4", "5", "6"], "{found:?}");
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_file_says_is_read_or_refused(
            parts in proptest::collection::vec(
                proptest::sample::select(vec![
                    "interfaces", "link", "sat0", "proxy", "port", "rate", "only", "tcp", "cork", "true", "=", " = ",
                    "[", "]", "[[", "]]", "{", "}", ".", ",", "\"", "'", "\"\"\"", "\\", "\n", "\r", "\t", " ", "#", "5",
                    "-1", "1e9", "50mbit", "\u{e9}", "\u{1f6f0}", "\0", "\u{feff}", "1979-05-27",
                ]),
                0..24,
            ),
        ) {
            let content: String = parts.concat();
            match read(Path::new("p.toml"), &content) {
                Ok(_) => {}
                Err(problems) => proptest::prop_assert!(!problems.is_empty()),
            }
        }
    }

    #[test]
    fn values_become_what_would_be_typed() {
        let given = read(
            Path::new("p.toml"),
            "interfaces = [\"lan0\", \"sat0\"]\ntcp.fastopen = true\ntcp.cork = false\nproxy.port = 5_001\n\
             steering.mark = 0x2\n[link.sat0]\nrtt = \"600ms\"\nrate = \"50mbit\"\nmss = 1400",
        );
        let given = given.unwrap();
        let mut arguments: Vec<&str> = given
            .iter()
            .flat_map(|given| &given.arguments)
            .map(String::as_str)
            .collect();
        arguments.sort_unstable();
        assert_eq!(
            arguments,
            [
                "--fastopen",
                "--interface=lan0",
                "--interface=sat0",
                "--link=sat0,mss=1400,rate=50mbit,rtt=600ms",
                "--mark=0x2",
                "--port=5001",
            ]
        );
    }
}
