//! The configuration: the command line, and the file that it names.
//!
//! The file is converted to command-line arguments. Each key corresponds to an option ([`keys`]), whose
//! parser reads its value, and options of the command line override those of the file. So both accept the
//! same values with the same meaning.

pub(crate) mod options;
mod file;
mod keys;
mod problem;

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{ArgMatches, FromArgMatches, parser::ValueSource};

pub use crate::config::problem::Problem;
pub(crate) use crate::config::{
    keys::{Applies, KEYS, Key},
    problem::Text,
};

use crate::{config::options::Options, link::spec::LinkSpec, wire::selection::Rule};

/// The options of the daemon, and their sources.
#[derive(Debug, Clone)]
pub struct Configuration {
    /// The merged options of command line and file.
    pub options: Options,
    matches: ArgMatches,
    arguments: Vec<OsString>,
    /// Base of relative paths.
    directory: PathBuf,
}

impl Configuration {
    /// Parses a command line, and the configuration file that it names.
    ///
    /// # Errors
    /// All errors of the file.
    ///
    /// # Panics
    /// On an invalid command line, which the caller has parsed before.
    pub fn load(arguments: Vec<OsString>) -> Result<Self, Vec<Problem>> {
        let directory = env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Self::load_in(directory, arguments)
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// All errors of the file.
    pub fn reload(&self) -> Result<Self, Vec<Problem>> {
        Self::load_in(self.directory.clone(), self.arguments.clone())
    }

    fn load_in(directory: PathBuf, arguments: Vec<OsString>) -> Result<Self, Vec<Problem>> {
        let command = options::command();
        let typed = command
            .clone()
            .try_get_matches_from(&arguments)
            .expect("parsed before");
        let file = typed.get_one::<PathBuf>("config").cloned();
        let mut merged = arguments.clone();
        if let Some(file) = &file {
            let content = read_text(&directory, file)?;
            let given = file::read(file, &content)?;
            let is_typed = |option: &str| typed.value_source(option) == Some(ValueSource::CommandLine);
            let typed: Vec<&str> = command
                .get_arguments()
                .map(|arg| arg.get_id().as_str())
                .filter(|option| is_typed(option))
                .collect();
            let overridden = |option: &str| {
                typed
                    .iter()
                    .any(|typed| *typed == option || file::exclude_each_other(&command, typed, option))
            };
            let of_file = given.into_iter().filter(|given| !overridden(given.option));
            merged.splice(
                1..1,
                of_file.flat_map(|given| given.arguments).map(OsString::from),
            );
        }
        let matches = command.try_get_matches_from(merged).map_err(|error| {
            let what = error.to_string();
            let file = file.as_deref().unwrap_or(Path::new("command line"));
            vec![Problem::of_file(file, what.lines().next().unwrap_or_default())]
        })?;
        let mut options = Options::from_arg_matches(&matches).expect("clap made both");
        if let (Some(file), true, false) = (&file, options.interfaces.is_empty(), options.explain) {
            let what = "interfaces is missing: name the interfaces to intercept, like \
                        interfaces = [\"lan0\", \"sat0\"]";
            return Err(vec![Problem::of_file(file, what)]);
        }
        let steering = &mut options.steering;
        for (lists, rules) in [
            (&steering.only_from, &mut steering.only),
            (&steering.bypass_from, &mut steering.bypass),
        ] {
            for list in lists {
                rules.extend(read_rules(&directory, list)?);
            }
        }
        Ok(Self {
            options,
            matches,
            arguments,
            directory,
        })
    }

    /// Returns the keys whose values differ in `other`.
    pub fn changes_to(&self, other: &Self) -> Vec<Change> {
        let of_key = |key: &Key| {
            let (before, now) = (self.values(key), other.values(key));
            (before != now).then(|| Change {
                key: key.name.to_owned(),
                before: self.show(key, &before),
                now: other.show(key, &now),
                applies: key.applies,
            })
        };
        let mut changes: Vec<Change> = KEYS.iter().filter_map(of_key).collect();
        changes.extend(self.changed_links(other));
        changes
    }

    fn changed_links(&self, other: &Self) -> Vec<Change> {
        let (before, now) = (&self.options.links, &other.options.links);
        let mut interfaces: Vec<&str> = before.iter().chain(now).map(|link| &*link.interface).collect();
        interfaces.sort_unstable();
        interfaces.dedup();
        let of_link = |interface: &str| {
            let find = |links: &[LinkSpec]| links.iter().find(|link| link.interface == interface).cloned();
            (find(before) != find(now)).then(|| Change {
                key: format!("link.{interface}"),
                before: self.link_text(interface),
                now: other.link_text(interface),
                applies: Applies::Live,
            })
        };
        interfaces.into_iter().filter_map(of_link).collect()
    }

    /// Returns the values of a key as written, and the rules of the lists that it names.
    fn values(&self, key: &Key) -> Vec<String> {
        let raw = self.matches.get_raw(key.option).into_iter().flatten();
        let mut values: Vec<String> = raw.map(|value| value.to_string_lossy().into_owned()).collect();
        let steering = &self.options.steering;
        match key.option {
            "only_from" if !values.is_empty() => values.extend(steering.only.iter().map(Rule::to_string)),
            "bypass_from" if !values.is_empty() => values.extend(steering.bypass.iter().map(Rule::to_string)),
            _ => {}
        }
        values
    }

    fn show(&self, key: &Key, values: &[String]) -> String {
        let typed = |option: &str| self.matches.get_raw(option).map_or(0, Iterator::count);
        let steering = &self.options.steering;
        match (key.option, values.len()) {
            (_, 0) => NOTHING.into(),
            ("only_from", _) => format!("{} rules", steering.only.len() - typed("only")),
            ("bypass_from", _) => format!("{} rules", steering.bypass.len() - typed("bypass")),
            (_, 1..=SHOWN) => values.join(","),
            (_, many) => format!("{many} values"),
        }
    }

    fn link_text(&self, interface: &str) -> String {
        let raw = self.matches.get_raw(keys::LINKS).into_iter().flatten();
        let of_interface = |text: &str| Some(text.strip_prefix(interface)?.strip_prefix(',')?.to_owned());
        raw.filter_map(|value| of_interface(&value.to_string_lossy()))
            .next()
            .unwrap_or_else(|| NOTHING.into())
    }
}

/// Shown for a key without a value.
const NOTHING: &str = "none";

/// Maximum length of a shown list; longer lists are counted.
const SHOWN: usize = 4;

/// A changed key.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    pub(crate) key: String,
    pub(crate) before: String,
    pub(crate) now: String,
    pub(crate) applies: Applies,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            before,
            now,
            applies,
        } = self;
        match applies {
            Applies::Live if before == now => write!(f, "{key} (other rules)"),
            Applies::Live => write!(f, "{key} {before} -> {now}"),
            Applies::AtStart => write!(f, "{key}: needs a restart, still {before}"),
        }
    }
}

fn read_text(directory: &Path, file: &Path) -> Result<String, Vec<Problem>> {
    fs::read_to_string(directory.join(file))
        .map_err(|error| vec![Problem::of_file(file, &format!("cannot be read: {error}"))])
}

/// Reads a list of rules: one per line; `#` starts a comment.
fn read_rules(directory: &Path, list: &Path) -> Result<Vec<Rule>, Vec<Problem>> {
    let content = read_text(directory, list)?;
    let text = Text::new(list, &content);
    let (mut rules, mut problems, mut at) = (Vec::new(), Vec::new(), 0);
    for line in content.split_inclusive('\n') {
        let rule = line.split('#').next().unwrap_or_default();
        let indent = rule.len() - rule.trim_start().len();
        match rule.trim() {
            "" => {}
            rule => match rule.parse::<Rule>() {
                Ok(rule) => rules.push(rule),
                Err(what) => problems.push(text.problem(at + indent, &what)),
            },
        }
        at += line.len();
    }
    match problems.is_empty() {
        true => Ok(rules),
        false => Err(problems),
    }
}

/// Runs `pepsal check`: prints each error of a file in a line, or a summary of the file.
pub fn check(file: &Path) -> ExitCode {
    let arguments = ["pepsal".into(), "--config".into(), file.into()];
    match Configuration::load(arguments.into()) {
        Ok(configuration) => {
            println!("{}: {}", file.display(), Summary(&configuration.options));
            ExitCode::SUCCESS
        }
        Err(problems) => refuse(&problems),
    }
}

/// Prints one line for each problem, and returns the exit code.
pub fn refuse(problems: &[Problem]) -> ExitCode {
    for problem in problems {
        eprintln!("{problem}");
    }
    ExitCode::FAILURE
}

struct Summary<'a>(&'a Options);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (options, steering) = (self.0, &self.0.steering);
        write!(f, "valid; intercepts on {}", options.interfaces.join(", "))?;
        if !options.links.is_empty() {
            let links: Vec<&str> = options.links.iter().map(|link| &*link.interface).collect();
            write!(f, "; has a profile for {}", links.join(", "))?;
        }
        match steering.only.len() + steering.bypass.len() {
            0 => write!(f, "; selects every connection"),
            1 => write!(f, "; selects by one rule"),
            rules => write!(f, "; selects by {rules} rules"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use super::*;
    use crate::{link::profile::LinkProfile, observe::log::LogLevel};

    /// A directory with files, removed on drop.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let path = env::temp_dir().join(format!("pepsal-config-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            for (file, content) in files {
                fs::write(path.join(file), content).unwrap();
            }
            Self(path)
        }

        fn load(&self, arguments: &[&str]) -> Result<Configuration, Vec<Problem>> {
            let arguments = ["pepsal", "-F", "p.toml"].iter().chain(arguments);
            Configuration::load_in(self.0.clone(), arguments.map(OsString::from).collect())
        }

        fn problems(&self, arguments: &[&str]) -> Vec<String> {
            let problems = self.load(arguments).expect_err("the file is wrong");
            problems.iter().map(Problem::to_string).collect()
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_its_lists_replace() {
        let file = "interfaces = [\"a\", \"b\"]\nproxy.port = 1\nproxy.max-connections = 7\ntcp.cork = true\nlog.level = \"warn\"\n\
                    steering.only = [\"10.0.0.0/8\"]\n[link.a]\nrate = \"5mbit\"\nrtt = \"1s\"";
        let directory = Directory::new("precedence", &[("p.toml", file)]);
        let options = directory.load(&[]).unwrap().options;
        assert_eq!(options.interfaces, ["a", "b"]);
        assert_eq!((options.port.get(), options.max_connections), (1, 7));
        assert_eq!((options.level(), options.tcp.cork), (LogLevel::Warn, true));
        assert_eq!((options.links.len(), options.steering.only.len()), (1, 1));

        let typed = [
            "-i",
            "c",
            "-p",
            "2",
            "-n",
            "-v",
            "--link",
            "c,rate=9mbit,rtt=2s",
            "--only",
            "port=1",
        ];
        let options = directory.load(&typed).unwrap().options;
        assert_eq!(options.interfaces, ["c"]);
        assert_eq!((options.port.get(), options.max_connections), (2, 7));
        assert_eq!(
            (options.level(), options.tcp.cork),
            (LogLevel::Debug, false),
            "they exclude each other"
        );
        assert_eq!(options.links[0].interface, "c");
        assert_eq!(options.steering.only[0].to_string(), "port=1-1");
    }

    #[test]
    fn a_file_without_interfaces_needs_them_on_the_command_line() {
        let directory = Directory::new("interfaces", &[("p.toml", "")]);
        assert!(directory.problems(&[])[0].starts_with("p.toml: interfaces is missing"));
        assert_eq!(directory.load(&["-i", "a"]).unwrap().options.interfaces, ["a"]);
    }

    #[test]
    fn rules_come_from_lists_too() {
        let file = "interfaces = [\"a\"]\nsteering.only = [\"port=80\"]\nsteering.only-from = [\"l\"]";
        let list = "# all of them\n\n  10.0.0.0/8 # ours\nsrc=fd00::/8\n";
        let directory = Directory::new("lists", &[("p.toml", file), ("l", list)]);
        let rules = directory.load(&[]).unwrap().options.steering.only;
        let texts: Vec<String> = rules.iter().map(Rule::to_string).collect();
        assert_eq!(
            texts,
            [
                "port=80-80",
                "dst=10.0.0.0/8,port=0-65535",
                "src=fd00::/8,port=0-65535"
            ]
        );

        fs::write(directory.0.join("l"), "10.0.0.0/8\n  10.0.0/8\n\nport=x").unwrap();
        let problems = directory.problems(&[]);
        assert!(
            problems[0].starts_with("l:2:3: '10.0.0/8' is not an IPv4 or IPv6 prefix"),
            "{problems:?}"
        );
        assert!(
            problems[1].starts_with("l:4:1: 'x' is not a port"),
            "{problems:?}"
        );
        fs::remove_file(directory.0.join("l")).unwrap();
        assert!(directory.problems(&[])[0].starts_with("l: cannot be read: No such file"));
    }

    #[test]
    fn changes_name_the_key_and_both_values() {
        let before = "interfaces = [\"a\"]\nproxy.idle-timeout = \"1h\"\nsteering.only-from = [\"l\"]\n\
                      link.a = { rate = \"5mbit\", rtt = \"1s\" }";
        let directory = Directory::new("changes", &[("p.toml", before), ("l", "10.0.0.0/8")]);
        let running = directory.load(&["-p", "1"]).unwrap();
        assert_eq!(running.changes_to(&running.reload().unwrap()), []);

        let now = "interfaces = [\"a\"]\nproxy.max-connections = 9\nproxy.port = 3\nsteering.only-from = [\"l\"]\n\
                   link.a = { rate = \"9mbit\", rtt = \"1s\" }";
        fs::write(directory.0.join("p.toml"), now).unwrap();
        fs::write(directory.0.join("l"), "11.0.0.0/8").unwrap();
        let changes = running.changes_to(&running.reload().unwrap());
        let lines: Vec<String> = changes.iter().map(Change::to_string).collect();
        assert_eq!(
            lines,
            [
                "proxy.max-connections: needs a restart, still 2112",
                "proxy.idle-timeout 1h -> 1day",
                "steering.only-from (other rules)",
                "link.a rate=5mbit,rtt=1s -> rate=9mbit,rtt=1s",
            ],
            "the command line's port stays"
        );
    }

    /// The packaged file with every key uncommented: `#key = value` is a key, `# Words` are a comment.
    fn uncommented() -> String {
        let text = include_str!("../../../packaging/pepsal.toml");
        let uncomment = |line: &str| match line.strip_prefix('#') {
            Some(key) if !key.is_empty() && !key.starts_with(' ') => key.to_owned(),
            _ => line.to_owned(),
        };
        text.lines().map(|line| uncomment(line) + "\n").collect()
    }

    #[test]
    fn the_packaged_file_has_every_key_with_its_default() {
        let packaged = uncommented();
        let given = file::read(Path::new("pepsal.toml"), &packaged).unwrap();
        let command = options::command();
        let table = toml::de::DeTable::parse(&packaged).unwrap();
        for key in KEYS {
            let (table_name, name) = key.name.split_once('.').unwrap_or(("", key.name));
            let table = match table_name {
                "" => table.get_ref(),
                _ => table
                    .get_ref()
                    .get(table_name)
                    .unwrap()
                    .get_ref()
                    .as_table()
                    .unwrap(),
            };
            assert!(table.contains_key(name), "{} is not in the file", key.name);
        }
        let given: Vec<String> = given.into_iter().flat_map(|given| given.arguments).collect();
        let arguments = ["pepsal".to_owned()].into_iter().chain(given);
        let packaged = command.clone().try_get_matches_from(arguments).unwrap();
        let default = command
            .clone()
            .try_get_matches_from(["pepsal", "-i", "lan0", "-i", "sat0"])
            .unwrap();
        let mut without = HashSet::new();
        for key in KEYS {
            let raw = |matches: &ArgMatches| -> Vec<OsString> {
                let raw = matches.get_raw(key.option).into_iter().flatten();
                // A list of the file is comma-separated on the command line.
                raw.flat_map(|value| {
                    value
                        .to_str()
                        .unwrap()
                        .split(',')
                        .map(OsString::from)
                        .collect::<Vec<_>>()
                })
                .collect()
            };
            let has_none = raw(&default).is_empty() && !raw(&packaged).is_empty();
            match has_none {
                true => drop(without.insert(key.name)),
                false => assert_eq!(raw(&packaged), raw(&default), "{}", key.name),
            }
        }
        let text = include_str!("../../../packaging/pepsal.toml");
        let said = text.lines().filter(|line| line.contains("No default:")).count();
        assert_eq!(
            said,
            without.len() + 1,
            "the keys without default, and link.mss: {without:?}"
        );
    }

    #[test]
    fn the_documentation_has_every_key_and_says_when_it_applies() {
        let text = include_str!("../../../docs/configuration.md");
        for key in KEYS {
            let start = format!("| `{}` |", key.name);
            let row = text.lines().find(|line| line.starts_with(&start));
            let cells: Vec<&str> = row.expect(key.name).split(" | ").collect();
            let applies = match key.applies {
                Applies::Live => "reload",
                Applies::AtStart => "restart",
            };
            assert!(cells[3].starts_with(applies), "{}: {}", key.name, cells[3]);
        }
    }

    #[test]
    fn the_packaged_files_link_shows_what_follows_from_rate_and_round_trip() {
        let directory = Directory::new("link", &[("p.toml", &uncommented())]);
        let derive = |links: &[LinkSpec]| {
            LinkProfile::derive(&links[0], &"pepsal".into(), Duration::from_secs(60)).to_string()
        };
        let packaged = directory.load(&[]).unwrap().options.links;
        let plain = directory
            .load(&["--link", "sat0,rate=50mbit,rtt=600ms"])
            .unwrap()
            .options
            .links;
        let values = |links: &[LinkSpec]| -> Vec<String> {
            let table = derive(links);
            table
                .lines()
                .map(|line| line[..36].to_owned())
                .filter(|line| !line.contains("mss"))
                .collect()
        };
        assert_eq!(values(&packaged), values(&plain));
    }
}
