//! Which connections are intercepted: rules, and the tables that the kernel looks them up in.
//!
//! Destination, source and port are judged apart, and a connection is intercepted when all three agree. Each has its
//! list of rules, `only` and `bypass`; the most specific rule that matches decides: the longest prefix, then the
//! narrowest range of ports, then `bypass`. Where no rule matches, the connection passes if the list has an `only`, and
//! is intercepted otherwise.
//!
//! This module evaluates the rules. The kernel gets a set of ports for every prefix that a rule names, in two tries, so that
//! the program needs one look-up for the destination and one for the source, whatever the number of rules.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    ops::RangeInclusive,
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use pepsal_ebpf::{MappedAddr, PORT_SET_BYTES, PortSet, map_addr};

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Destination(IpNet),
    Source(IpNet),
    /// Every address of both families.
    Port,
}

/// The argument of `--only` or `--bypass`: matches a prefix, a range of destination ports, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    subject: Subject,
    ports: RangeInclusive<u16>,
}

const ALL_PORTS: RangeInclusive<u16> = 0..=u16::MAX;

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rule = Self {
            subject: Subject::Port,
            ports: ALL_PORTS,
        };
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or(("dst", part));
            match key {
                "port" | "ports" if rule.ports == ALL_PORTS => rule.ports = ports(value)?,
                "dst" | "src" if rule.subject == Subject::Port => {
                    let (prefix, range) = prefix_and_ports(value)?;
                    rule.subject = match key {
                        "dst" => Subject::Destination(prefix),
                        _ => Subject::Source(prefix),
                    };
                    if let Some(range) = range {
                        rule.ports = range;
                    }
                }
                "port" | "ports" | "dst" | "src" => {
                    return Err(format!(
                        "'{text}' names two prefixes or two ranges of ports: make it two rules"
                    ));
                }
                _ => return Err(format!("'{key}' is not dst, src or port")),
            }
        }
        Ok(rule)
    }
}

/// `PREFIX`, `PREFIX:PORTS`, and for IPv6 with ports `[ADDRESS]/LENGTH:PORTS` or `[PREFIX]:PORTS`.
fn prefix_and_ports(text: &str) -> Result<(IpNet, Option<RangeInclusive<u16>>), String> {
    if let Some(rest) = text.strip_prefix('[') {
        let (inside, after) = rest
            .split_once(']')
            .ok_or_else(|| format!("'{text}' lacks its ']'"))?;
        return Ok(match after.split_once(':') {
            Some((length, range)) => (prefix(&format!("{inside}{length}"))?, Some(ports(range)?)),
            None => (prefix(&format!("{inside}{after}"))?, None),
        });
    }
    match text.split_once(':') {
        Some((v4, range)) if !range.contains(':') && v4.contains('.') => {
            Ok((prefix(v4)?, Some(ports(range)?)))
        }
        Some(("", range)) if !range.contains(':') => {
            Err(format!("':{range}' lacks its prefix: write port={range}"))
        }
        _ => Ok((prefix(text)?, None)),
    }
}

fn prefix(text: &str) -> Result<IpNet, String> {
    let parsed = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    match parsed {
        Ok(net) => Ok(net.trunc()),
        Err(_) => Err(format!(
            "'{text}' is not an IPv4 or IPv6 prefix, like 10.0.0.0/8 or fd00::/8"
        )),
    }
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err(format!(
            "'{text}' is not a port or a range of ports, like 443 or 8000-8099"
        )),
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.subject {
            Subject::Destination(net) => write!(f, "dst={net},")?,
            Subject::Source(net) => write!(f, "src={net},")?,
            Subject::Port => {}
        }
        write!(f, "port={}-{}", self.ports.start(), self.ports.end())
    }
}

/// The evaluated rules, as the kernel's maps contain them.
#[derive(Debug, PartialEq, Eq)]
pub struct Selection {
    /// Destination prefixes: address, length in bits (of 128), index into `port_sets`.
    pub destinations: Vec<(MappedAddr, u32, u32)>,
    /// Source prefixes, in the same form.
    pub sources: Vec<(MappedAddr, u32, u32)>,
    /// Sets of the destination ports that are intercepted.
    pub port_sets: Vec<Box<PortSet>>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Only,
    Bypass,
}

impl Selection {
    /// Evaluates the rules: for every prefix that a rule names, the set of intercepted ports.
    pub fn new(only: &[Rule], bypass: &[Rule]) -> Self {
        let mut rules: Vec<(Action, &Rule)> = Vec::new();
        rules.extend(only.iter().map(|rule| (Action::Only, rule)));
        rules.extend(bypass.iter().map(|rule| (Action::Bypass, rule)));
        // Later rules are painted over earlier ones: the least specific first.
        rules.sort_by_key(|(action, rule)| {
            let prefix_len = match rule.subject {
                Subject::Destination(net) | Subject::Source(net) => net.prefix_len(),
                Subject::Port => 0,
            };
            (
                prefix_len,
                std::cmp::Reverse(rule.ports.end() - rule.ports.start()),
                *action,
            )
        });
        let list = |wanted: fn(&Subject) -> Option<IpNet>| -> List {
            let of_list = |&(action, rule): &(Action, &Rule)| {
                wanted(&rule.subject).map(|net| (action, net, rule.ports.clone()))
            };
            List::new(rules.iter().filter_map(of_list).collect())
        };
        let destinations = list(|subject| match subject {
            Subject::Destination(net) => Some(*net),
            _ => None,
        });
        let sources = list(|subject| match subject {
            Subject::Source(net) => Some(*net),
            _ => None,
        });
        let port_rules = list(|subject| (*subject == Subject::Port).then(|| Ipv4Net::default().into()));
        let mut by_port = [0; PORT_SET_BYTES];
        port_rules.each_set(|net, ports| {
            if net == IpNet::from(Ipv4Net::default()) {
                by_port = *ports;
            }
        });

        let mut sets = PortSets::default();
        let mut table = |list: &List, and: &PortSet| -> Vec<(MappedAddr, u32, u32)> {
            let mut entries = Vec::new();
            list.each_set(|net, ports| {
                let mut ports = *ports;
                ports.iter_mut().zip(and).for_each(|(own, other)| *own &= other);
                let (addr, len) = mapped(net);
                entries.push((addr, len, sets.index_of(&ports)));
            });
            entries
        };
        // The port's own verdict rides on the destination's, so that it costs no look-up.
        let destinations = table(&destinations, &by_port);
        let sources = table(&sources, &[0xff; PORT_SET_BYTES]);
        Self {
            destinations,
            sources,
            port_sets: sets.sets,
        }
    }
}

fn mapped(net: IpNet) -> (MappedAddr, u32) {
    let len = u32::from(net.prefix_len());
    match net {
        IpNet::V4(_) => (map_addr(net.network()), len + 96),
        IpNet::V6(_) => (map_addr(net.network()), len),
    }
}

/// The rules of one subject by their prefix, in the order of the prefixes' first addresses, the shorter first; those of one
/// prefix the least specific first. Both families' default is always there, so that each look-up finds one.
struct List {
    rules: BTreeMap<IpNet, Vec<(Action, RangeInclusive<u16>)>>,
    default: bool,
}

impl List {
    fn new(rules: Vec<(Action, IpNet, RangeInclusive<u16>)>) -> Self {
        let default = rules.iter().all(|(action, ..)| *action != Action::Only);
        let all = [IpNet::from(Ipv4Net::default()), IpNet::from(Ipv6Net::default())];
        let mut by_prefix: BTreeMap<_, Vec<_>> = all.map(|net| (net, Vec::new())).into();
        for (action, net, ports) in rules {
            by_prefix.entry(net).or_default().push((action, ports));
        }
        Self {
            rules: by_prefix,
            default,
        }
    }

    /// For each prefix the ports that are intercepted there: what holds for the longest that covers it, and its own rules
    /// painted over that.
    fn each_set(&self, mut take: impl FnMut(IpNet, &PortSet)) {
        // The prefixes that cover the present one, the shortest first.
        let mut covering: Vec<(IpNet, Box<PortSet>)> = Vec::new();
        for (net, rules) in &self.rules {
            while covering.pop_if(|(outer, _)| !outer.contains(net)).is_some() {}
            let mut ports = match covering.last() {
                Some((_, outer)) => outer.clone(),
                None => Box::new([if self.default { 0xff } else { 0 }; PORT_SET_BYTES]),
            };
            for (action, range) in rules {
                paint(&mut ports, range, *action == Action::Only);
            }
            take(*net, &ports);
            covering.push((*net, ports));
        }
    }
}

/// Puts a range of ports into a set, or takes it out.
fn paint(set: &mut PortSet, range: &RangeInclusive<u16>, taken: bool) {
    let (first, last) = (usize::from(*range.start()), usize::from(*range.end()));
    let bits = |byte: &mut u8, bits: u8| match taken {
        true => *byte |= bits,
        false => *byte &= !bits,
    };
    let (from_first, to_last) = (0xff << (first % 8), 0xff >> (7 - last % 8));
    match (first / 8, last / 8) {
        (one, same) if one == same => bits(&mut set[one], from_first & to_last),
        (begin, end) => {
            bits(&mut set[begin], from_first);
            set[begin + 1..end].fill(if taken { 0xff } else { 0 });
            bits(&mut set[end], to_last);
        }
    }
}

/// Sets of ports, each kept once.
#[derive(Default)]
struct PortSets {
    sets: Vec<Box<PortSet>>,
    indices: HashMap<Box<PortSet>, u32>,
}

impl PortSets {
    fn index_of(&mut self, set: &PortSet) -> u32 {
        if let Some(index) = self.indices.get(set) {
            return *index;
        }
        let index = self.sets.len() as u32;
        self.sets.push(Box::new(*set));
        self.indices.insert(Box::new(*set), index);
        index
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel does with the tables.
    fn lookup(selection: &Selection, source: IpAddr, destination: IpAddr, port: u16) -> bool {
        let find = |table: &[(MappedAddr, u32, u32)], addr: IpAddr| {
            let addr = u128::from_be_bytes(map_addr(addr).octets());
            let (.., index) = table
                .iter()
                .filter(|(prefix, len, _)| {
                    let shift = 128 - len;
                    let prefix = u128::from_be_bytes(prefix.octets());
                    addr.checked_shr(shift).unwrap_or(0) == prefix.checked_shr(shift).unwrap_or(0)
                })
                .max_by_key(|(_, len, _)| *len)
                .expect("both families have a default");
            selection.port_sets[*index as usize][usize::from(port) / 8] & (1 << (port % 8)) != 0
        };
        find(&selection.destinations, destination) && find(&selection.sources, source)
    }

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn selects(only: &[&str], bypass: &[&str], destination: &str, port: u16) -> bool {
        let selection = Selection::new(&rules(only), &rules(bypass));
        lookup(
            &selection,
            "192.0.2.1".parse().unwrap(),
            destination.parse().unwrap(),
            port,
        )
    }

    #[test]
    fn everything_is_selected_without_rules() {
        assert!(selects(&[], &[], "10.0.0.1", 80));
        assert!(selects(&[], &[], "2001:db8::1", 443));
        assert_eq!(Selection::new(&[], &[]).port_sets.len(), 1);
    }

    #[test]
    fn only_leaves_all_else_alone_in_both_families() {
        assert!(selects(&["10.0.0.0/8"], &[], "10.1.2.3", 80));
        assert!(!selects(&["10.0.0.0/8"], &[], "11.1.2.3", 80));
        assert!(!selects(&["10.0.0.0/8"], &[], "2001:db8::1", 80));
    }

    #[test]
    fn the_longest_prefix_wins() {
        let (only, bypass) = (&["10.0.0.0/8", "10.1.1.0/24"], &["10.1.0.0/16"]);
        assert!(selects(only, bypass, "10.2.0.1", 80));
        assert!(!selects(only, bypass, "10.1.2.1", 80));
        assert!(selects(only, bypass, "10.1.1.1", 80));
    }

    #[test]
    fn ports_are_judged_apart_from_prefixes() {
        assert!(!selects(&["10.1.1.1"], &["port=22"], "10.1.1.1", 22));
        assert!(selects(&["10.1.1.1"], &["port=22"], "10.1.1.1", 23));
        assert!(!selects(&["10.0.0.0/8", "port=443"], &[], "10.1.1.1", 80));
        assert!(selects(&["port=8000-8099"], &["port=8080"], "10.1.1.1", 8081));
        assert!(!selects(&["port=8000-8099"], &["port=8080"], "10.1.1.1", 8080));
    }

    #[test]
    fn a_prefix_may_have_ports() {
        let bypass = &["10.0.0.0/8:22", "[2001:db8::]/32:22-23", "[2001:db8:1::/48]:80"];
        assert!(!selects(&[], bypass, "10.0.0.1", 22));
        assert!(selects(&[], bypass, "10.0.0.1", 80));
        assert!(selects(&[], bypass, "11.0.0.1", 22));
        assert!(!selects(&[], bypass, "2001:db8::1", 23));
        assert!(!selects(&[], bypass, "2001:db8:1::1", 80));
        assert!(
            !selects(&[], bypass, "2001:db8:1::1", 22),
            "the shorter prefix's rule holds inside the longer"
        );
        assert!(selects(&["dst=10.0.0.0/8,port=443"], &[], "10.0.0.1", 443));
        assert!(!selects(&["dst=10.0.0.0/8,port=443"], &[], "10.0.0.1", 80));
    }

    #[test]
    fn sources_are_judged_apart_from_destinations() {
        let selection = Selection::new(&rules(&["src=192.0.2.0/24"]), &rules(&["src=192.0.2.128/25"]));
        let to = "198.51.100.1".parse().unwrap();
        assert!(lookup(&selection, "192.0.2.1".parse().unwrap(), to, 80));
        assert!(!lookup(&selection, "192.0.2.129".parse().unwrap(), to, 80));
        assert!(!lookup(&selection, "203.0.113.1".parse().unwrap(), to, 80));
    }

    #[test]
    fn ranges_are_painted_to_the_port() {
        for range in [
            0..=0,
            7..=8,
            8..=15,
            3..=5,
            1..=65_535,
            0..=65_535,
            65_535..=65_535,
            1000..=2000,
        ] {
            for taken in [true, false] {
                let mut set = [if taken { 0 } else { 0xff }; PORT_SET_BYTES];
                paint(&mut set, &range, taken);
                for port in 0..=u16::MAX {
                    let is_in = set[usize::from(port) / 8] & (1 << (port % 8)) != 0;
                    assert_eq!(is_in == taken, range.contains(&port), "{range:?} {taken} {port}");
                }
            }
        }
    }

    #[test]
    fn bad_rules_say_what_is_wrong() {
        for (text, complaint) in [
            ("10.0.0.0/33", "'10.0.0.0/33' is not an IPv4 or IPv6 prefix"),
            ("10.0.0.0/8:99999", "'99999' is not a port"),
            ("port=90-80", "'90-80' is not a port"),
            ("to=10.0.0.0/8", "'to' is not dst, src or port"),
            ("src=10.0.0.0/8,dst=10.0.0.0/8", "two prefixes"),
            (":80", "port=80"),
            ("[::1", "lacks its ']'"),
            ("", "'' is not an IPv4 or IPv6 prefix"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        // Few addresses and ports, so that rules overlap.
        let net = (0u8..4, 0u8..4, prop::sample::select(vec![0u8, 8, 16, 24, 32]))
            .prop_map(|(a, b, len)| IpNet::new(IpAddr::from([10, a, b, 1]), len).unwrap().trunc());
        let subject = prop_oneof![
            net.clone().prop_map(Subject::Destination),
            net.prop_map(Subject::Source),
            Just(Subject::Port),
        ];
        let ports = prop_oneof![
            Just(ALL_PORTS),
            (0u16..8, 0u16..8).prop_map(|(a, b)| a.min(b)..=a.max(b))
        ];
        (subject, ports).prop_map(|(subject, ports)| Rule { subject, ports })
    }

    /// The rules' meaning, as the module's documentation puts it.
    fn meaning(only: &[Rule], bypass: &[Rule], source: IpAddr, destination: IpAddr, port: u16) -> bool {
        let judge = |matches: &dyn Fn(&Subject) -> Option<u8>| {
            let best = |rules: &[Rule], bypass: bool| {
                rules
                    .iter()
                    .filter(|rule| rule.ports.contains(&port))
                    .filter_map(|rule| {
                        let width = rule.ports.end() - rule.ports.start();
                        matches(&rule.subject).map(|len| (len, std::cmp::Reverse(width), bypass))
                    })
                    .max()
            };
            let listed = only
                .iter()
                .any(|rule| match (&rule.subject, matches(&Subject::Port)) {
                    (Subject::Port, Some(_)) => true,
                    (Subject::Port, None) | (_, Some(_)) => false,
                    (Subject::Destination(_), None) => {
                        matches(&Subject::Destination(Ipv4Net::default().into())).is_some()
                    }
                    (Subject::Source(_), None) => {
                        matches(&Subject::Source(Ipv4Net::default().into())).is_some()
                    }
                });
            best(only, false)
                .max(best(bypass, true))
                .map_or(!listed, |(.., bypass)| !bypass)
        };
        judge(&|subject| match subject {
            Subject::Destination(net) => net.contains(&destination).then(|| net.prefix_len()),
            _ => None,
        }) && judge(&|subject| match subject {
            Subject::Source(net) => net.contains(&source).then(|| net.prefix_len()),
            _ => None,
        }) && judge(&|subject| (*subject == Subject::Port).then_some(0))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_tables_mean_what_the_rules_say(
            only in prop::collection::vec(any_rule(), 0..4),
            bypass in prop::collection::vec(any_rule(), 0..4),
            (a, b, c, d) in (0u8..4, 0u8..4, 0u8..4, 0u8..4),
            port in 0u16..10,
        ) {
            let (source, destination) = (IpAddr::from([10, a, b, 1]), IpAddr::from([10, c, d, 1]));
            let selection = Selection::new(&only, &bypass);
            prop_assert_eq!(
                lookup(&selection, source, destination, port),
                meaning(&only, &bypass, source, destination, port)
            );
        }
    }
}
