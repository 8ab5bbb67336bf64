//! Checks Grafana's dashboard and Prometheus' rules in `packaging/`.
//!
//! The types of Grafana's npm package `@grafana/schema` check the dashboard: the type checker reads the file
//! as a literal. A Prometheus that scrapes a running daemon has to return data for each query of the
//! dashboard, and to evaluate each rule.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use pepsal_tests::{Daemon, Family, Link, LinkProfile, Namespace, Server, Topology, Transfer};
use serde_json::{Value, json};

use crate::{
    build, cargo,
    setup::{self, Needs},
    shell,
};

const DASHBOARD: &str = "packaging/grafana/pepsal.json";
const RULES: &str = "packaging/prometheus/pepsal.rules.yml";

/// Version of Grafana's types.
const SCHEMA: &str = "13.2.3";
const TYPESCRIPT: &str = "5.9.3";

/// Timeout until Prometheus has two samples of each metric.
const PATIENCE: Duration = Duration::from_secs(60);

/// Checks dashboard and rules.
pub fn run() -> Result<()> {
    ensure!(
        shell::is_root(),
        "namespaces need root: run this as root or with sudo"
    );
    let dashboard = fs::read_to_string(cargo::root().join(DASHBOARD)).context(DASHBOARD)?;
    let dashboard: Value = serde_json::from_str(&dashboard).context(DASHBOARD)?;
    shell::heading(&format!("Grafana's types, of version {SCHEMA}"));
    check_types(&dashboard)?;
    shell::heading("Prometheus' rules");
    shell::run(
        Command::new("promtool")
            .args(["check", "rules"])
            .arg(cargo::root().join(RULES)),
    )
    .context("promtool is Debian's package prometheus")?;
    shell::heading("Each query, asked of a Prometheus that watches a daemon");
    let daemon = build::daemon_with(&build::ebpf(&setup::run(Needs::Demo)?)?, false)?;
    check_queries(&dashboard, &daemon)
}

/// JSON has strings for enumerations, which TypeScript distinguishes. Grafana has defaults for missing
/// options of panels.
const TYPES: &str = "
type Json<T> = T extends string ? `${T}` : T extends (infer U)[] ? Json<U>[]
    : T extends object ? { [K in keyof T]: Json<T[K]> } : T;
type Given<T> = T extends (infer U)[] ? Given<U>[] : T extends object ? { [K in keyof T]?: Given<T[K]> } : T;
";

fn check_types(dashboard: &Value) -> Result<()> {
    let folder = cargo::target_dir().join("dashboard");
    fs::create_dir_all(&folder)?;
    let write = |name: &str, text: String| {
        fs::write(folder.join(name), text).with_context(|| format!("cannot write {name}"))
    };
    let needed =
        json!({"private": true, "dependencies": {"@grafana/schema": SCHEMA, "typescript": TYPESCRIPT}});
    write("package.json", needed.to_string())?;
    let options = json!({"strict": true, "noEmit": true, "skipLibCheck": true, "module": "nodenext"});
    let project = json!({"compilerOptions": options, "files": ["dashboard.ts"]});
    write("tsconfig.json", project.to_string())?;
    write("dashboard.ts", typed(dashboard)?)?;
    let mut npm = Command::new("npm");
    npm.args("install --silent --no-audit --no-fund --ignore-scripts".split(' '))
        .current_dir(&folder);
    shell::run(&mut npm).context("npm is Debian's package npm")?;
    let mut compiler = Command::new(folder.join("node_modules/.bin/tsc"));
    shell::run(compiler.args(["--project", "."]).current_dir(&folder))
        .with_context(|| format!("{DASHBOARD} is not what Grafana expects"))?;
    println!("{} panels are of Grafana's types.", panels(dashboard).count());
    Ok(())
}

/// Returns the dashboard and its panels' options as declarations of Grafana's types.
fn typed(dashboard: &Value) -> Result<String> {
    let mut text = format!("import type {{ Dashboard }} from '@grafana/schema';\n{TYPES}");
    let mut kinds = BTreeMap::new();
    let mut panels_text = String::new();
    for panel in panels(dashboard) {
        let kind = panel["type"].as_str().context("a panel has a type")?;
        let path = format!(
            "./node_modules/@grafana/schema/dist/types/raw/composable/{kind}/panelcfg/x/types.gen.js"
        );
        kinds.insert(kind, path);
        let (id, options) = (&panel["id"], &panel["options"]);
        writeln!(
            panels_text,
            "export const options{id}: Given<Json<{kind}.Options>> = {options:#};"
        )?;
        if let Some(custom) = panel["fieldConfig"]["defaults"].get("custom") {
            writeln!(
                panels_text,
                "export const custom{id}: Given<Json<{kind}.FieldConfig>> = {custom:#};"
            )?;
        }
    }
    for (kind, path) in kinds {
        writeln!(text, "import type * as {kind} from '{path}';")?;
    }
    writeln!(text, "export const dashboard: Json<Dashboard> = {dashboard:#};")?;
    Ok(text + &panels_text)
}

fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    panels.filter(|panel| panel["type"] != "row")
}

fn check_queries(dashboard: &Value, daemon: &Path) -> Result<()> {
    let topology = Topology::builder().link(Link::Tun(LinkProfile::GEO)).build()?;
    let server = Server::start(&topology.server)?;
    let link = "sat0,rate=50mbit,rtt=600ms";
    let _daemon = Daemon::start_quiet(
        daemon,
        &topology.gateway,
        &["-i", "lan0", "-i", "sat0", "--link", link],
    )?;
    let prometheus = Prometheus::start(&topology.gateway)?;
    let mut unanswered: Vec<(String, String)> = panels(dashboard)
        .flat_map(|panel| {
            panel["targets"]
                .as_array()
                .into_iter()
                .flatten()
                .map(move |target| (panel, target))
        })
        .map(|(panel, target)| (text(&panel["title"]), text(&target["expr"])))
        .collect();
    let count = unanswered.len();
    let start = Instant::now();
    while !unanswered.is_empty() {
        if start.elapsed() > PATIENCE {
            for (title, expression) in &unanswered {
                println!("{title}: nothing for {expression}");
            }
            bail!("{} of {count} queries returned no data", unanswered.len());
        }
        // A rate needs traffic between two scrapes.
        for family in Family::BOTH {
            Transfer::upload(2_000_000).run(&topology.client, server.address(family))?;
        }
        // Causes an event: a direct connection to the listener is refused.
        let _ = topology.gateway.run(|| TcpStream::connect(("127.0.0.1", 5000)));
        let mut left = Vec::new();
        for (title, expression) in unanswered {
            if prometheus.query(&expression)?.is_empty() {
                left.push((title, expression));
            }
        }
        unanswered = left;
    }
    println!("{count} queries returned data.");
    let state = prometheus.get("rules", &[])?;
    let rules = state["data"]["groups"].as_array().into_iter().flatten();
    let rules: Vec<&Value> = rules
        .flat_map(|group| group["rules"].as_array().into_iter().flatten())
        .collect();
    for rule in &rules {
        ensure!(rule["health"] == "ok" && rule["state"] != "firing", "{rule:#}");
    }
    ensure!(!rules.is_empty(), "Prometheus has no rules");
    println!("{} alerts are evaluated, and none is firing.", rules.len());
    Ok(())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A Prometheus that scrapes the daemon of its namespace every second.
struct Prometheus<'a> {
    child: Child,
    folder: PathBuf,
    namespace: &'a Namespace,
}

impl<'a> Prometheus<'a> {
    fn start(namespace: &'a Namespace) -> Result<Self> {
        let folder = cargo::target_dir().join("tmp/prometheus");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let configuration = folder.join("prometheus.yml");
        let rules = cargo::root().join(RULES);
        let global = "global: {scrape_interval: 1s, evaluation_interval: 1s}";
        fs::write(
            &configuration,
            format!(
                "{global}\nrule_files: ['{}']\nscrape_configs:\n- job_name: pepsal\n  \
                 static_configs: [{{targets: ['127.0.0.1:9300']}}]\n",
                rules.display()
            ),
        )?;
        let child = namespace
            .command("prometheus")
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .args(["--web.listen-address=127.0.0.1:9090", "--log.level=error"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run prometheus (Debian's package of that name)")?;
        let prometheus = Self {
            child,
            folder,
            namespace,
        };
        let start = Instant::now();
        while let Err(error) = prometheus.get("rules", &[]) {
            ensure!(
                start.elapsed() < PATIENCE,
                "Prometheus does not answer: {error:#}"
            );
            thread::sleep(Duration::from_millis(200));
        }
        Ok(prometheus)
    }

    /// Returns the result of a query of the dashboard, with Grafana's values of its variables.
    fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let expression = expression
            .replace("$instance", ".*")
            .replace("$__rate_interval", "30s");
        let answer = self.get("query", &["--data-urlencode", &format!("query={expression}")])?;
        ensure!(answer["status"] == "success", "{expression}: {}", answer["error"]);
        let result = answer["data"]["result"].as_array().cloned().unwrap_or_default();
        Ok(result
            .into_iter()
            .filter(|sample| sample["value"][1] != "NaN")
            .collect())
    }

    fn get(&self, what: &str, arguments: &[&str]) -> Result<Value> {
        let mut curl = self.namespace.command("curl");
        curl.args(["--silent", "--show-error", "--get"])
            .args(arguments)
            .arg(format!("http://127.0.0.1:9090/api/v1/{what}"));
        Ok(serde_json::from_str(&shell::output(&mut curl)?)?)
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
