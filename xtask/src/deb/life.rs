//! Tests the life cycle of the package in a booted, clean Debian, which is the gateway between a client and a
//! server: install, edit, start, use, monitor, reload, upgrade under load, purge. The gateway has a stateful
//! firewall, and network managers that manage every unmanaged device. The output is a transcript.

use std::{
    fs,
    net::SocketAddr,
    path::{self, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pepsal_tests::{
    Cancel, Connector, Direction, Family, Footprint, Namespace, Path, Server, Session, Topology, Transfer,
    eventually,
};

use super::{root::Root, system::System};
use crate::{cargo, shell};

const EDIT: &str = "interfaces = [\"lan0\", \"sat0\"]\n\n[link.sat0]\nrate = \"50mbit\"\nrtt = \"600ms\"\n";
const WRONG: &str = "\n[proxy]\nidle-timeuot = \"1h\"\n";

const CONFIGURATION: &str = "/etc/pepsal/pepsal.toml";

/// The gateway's firewall: accepts connections of the clients only, and counts dropped packets.
const FIREWALL: &str = "\
#!/usr/sbin/nft -f
flush ruleset
table inet gateway {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname lan0 ct state new accept
        counter
    }
}
";

/// Configuration by which systemd-networkd manages every device except the topology's.
const NETWORKD: &str = "[Match]\nName=!lo lan0 sat0\n\n[Network]\nAddress=198.51.100.1/24\n";
/// Configuration by which NetworkManager ignores the topology's devices only.
const NETWORK_MANAGER: &str =
    "[device-topology]\nmatch-device=interface-name:lan0;interface-name:sat0\nmanaged=0\n";

/// Number of upgrades.
const UPGRADES: u32 = 10;

/// The port of the web server.
const HTTP: u16 = 80;

/// The hardware address of the daemon's devices (`DEVICE_MAC` of pepsal-ebpf).
const DEVICE_ADDRESS: &str = "02:70:65:70:00:01";

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs all steps.
pub fn run(suite: &str, package: &path::Path) -> Result<()> {
    let root = Root::new(suite)?;
    for (path, text) in [
        ("/etc/nftables.conf", FIREWALL),
        ("/etc/systemd/network/50-every.network", NETWORKD),
        ("/etc/NetworkManager/conf.d/50-topology.conf", NETWORK_MANAGER),
    ] {
        fs::write(root.file(path), text).with_context(|| format!("cannot write {path} inside"))?;
    }
    let topology = Topology::new()?;
    shell::heading("Boot it, as the gateway between a client and a server");
    let system = System::boot(&root, &topology.gateway)?;
    let life = Life {
        web: Web::start(&topology.server)?,
        server: Server::start(&topology.server)?,
        system,
        topology,
        root,
    };
    life.whole(package).inspect_err(|_| {
        let _ = life
            .system
            .show("journalctl --output cat --unit pepsal --lines 30");
    })?;
    println!(
        "Installed, started, reloaded, upgraded {UPGRADES} times under load, and purged in a clean {suite}."
    );
    Ok(())
}

struct Life {
    // Fields drop in order: processes in the namespaces first, then the namespaces, then the folder.
    system: System,
    web: Web,
    server: Server,
    topology: Topology,
    root: Root,
}

impl Life {
    fn whole(&self, package: &path::Path) -> Result<()> {
        self.system
            .show("systemctl enable --now nftables systemd-networkd NetworkManager")?;
        let (clean, untouched) = (self.root.files()?, Footprint::of(&self.topology.gateway)?);
        self.install(package)?;
        self.start()?;
        self.leave_alone()?;
        self.work()?;
        self.reload()?;
        self.upgrade(&Successors::of(package)?)?;
        self.purge(&clean)?;
        ensure!(
            Footprint::of(&self.topology.gateway)? == untouched,
            "objects remain in the kernel after the purge"
        );
        Ok(())
    }

    fn install(&self, package: &path::Path) -> Result<()> {
        shell::heading("Install");
        let package = self.root.take(package)?;
        self.system.show(&format!("apt-get install --yes {package}"))?;
        self.system.show("dpkg --verify pepsal")?;
        self.system.show("pepsal --version")?;
        self.system.show("getent passwd pepsal")
    }

    fn start(&self) -> Result<()> {
        shell::heading("Edit and start");
        self.edit(EDIT)?;
        self.system.show(&format!("pepsal check {CONFIGURATION}"))?;
        self.system.show("systemctl enable --now pepsal")?;
        self.system.show("systemctl status --no-pager pepsal")?;
        let log = self.system.output("journalctl --output cat --unit pepsal")?;
        ensure!(
            !log.contains("cannot "),
            "the unit refuses what the daemon needs:\n{log}"
        );
        self.system
            .show("systemd-analyze security --no-pager pepsal.service")?;
        shell::heading("Check the host");
        self.system.show("pepsal doctor || true")
    }

    /// Compares the daemon's devices with an ordinary device.
    fn leave_alone(&self) -> Result<()> {
        shell::heading("Check that network managers ignore its devices");
        self.system
            .show("ip link add other0 type veth peer name other1")?;
        eventually(PATIENCE, || {
            let addresses = self.system.output("ip -brief -4 address show dev other0");
            addresses.is_ok_and(|addresses| addresses.contains("198.51.100.1"))
        });
        self.system.show("networkctl --no-pager list")?;
        self.system.show("nmcli device")?;
        self.system.show("ip link delete other0")?;
        self.devices_are_untouched()
    }

    fn devices_are_untouched(&self) -> Result<()> {
        let devices = || self.system.output("ls /sys/class/net | grep ^pepsal-");
        // Devices of an earlier version are removed shortly after its process.
        eventually(PATIENCE, || {
            devices().is_ok_and(|devices| devices.lines().count() == 2)
        });
        let devices = devices()?;
        for device in devices.lines() {
            for (command, expected) in [
                (format!("networkctl --no-legend list {device}"), "unmanaged"),
                (
                    format!("nmcli --get-values GENERAL.STATE device show {device}"),
                    "10 (unmanaged)",
                ),
                (
                    format!("udevadm test-builtin net_setup_link /sys/class/net/{device} 2>&1"),
                    "/10-pepsal.link",
                ),
                (format!("ip -brief link show dev {device}"), DEVICE_ADDRESS),
            ] {
                let shown = self.system.output(&command)?;
                ensure!(
                    shown.contains(expected),
                    "`{command}` shows no {expected}:\n{shown}"
                );
            }
            let addresses = self
                .system
                .output(&format!("ip -oneline address show dev {device}"))?;
            ensure!(addresses.is_empty(), "a device has an address:\n{addresses}");
        }
        println!("The daemon's devices have no address but {DEVICE_ADDRESS}, and no manager.");
        Ok(())
    }

    fn work(&self) -> Result<()> {
        shell::heading("Intercept a flow");
        let mut download = self.web.download(&self.topology.client);
        println!("client# {}", shell::line(&download));
        let mut download = download.spawn().context("cannot run curl")?;
        eventually(PATIENCE, || {
            let flows = self.system.output("pepsal flows");
            flows.is_ok_and(|flows| flows.contains(&format!(":{HTTP}")))
        });
        self.system.show("pepsal flows")?;
        ensure!(download.wait()?.success(), "a download through the daemon failed");
        println!("The web server's log: {}", self.web.log()?);
        self.new_flows_are(Path::Split)?;
        self.system.show("pepsal status")?;

        shell::heading("Scrape");
        let mut scrape = self.topology.gateway.command("curl");
        scrape.args([
            "--silent",
            "--show-error",
            "--fail",
            "http://127.0.0.1:9300/metrics",
        ]);
        println!("# {}", shell::line(&scrape));
        let scraped = shell::output(&mut scrape)?;
        let samples: Vec<&str> = scraped.lines().filter(|line| !line.starts_with('#')).collect();
        let shown = ["pepsal_flows", "pepsal_link_", "pepsal_up", "pepsal_connections"];
        for sample in samples
            .iter()
            .filter(|line| shown.iter().any(|name| line.starts_with(name)))
        {
            println!("{sample}");
        }
        println!("({} samples in all)", samples.len());
        ensure!(!samples.is_empty(), "there are no metrics");
        Ok(())
    }

    fn reload(&self) -> Result<()> {
        shell::heading("Reload");
        let lasting = self.session(Family::V4)?;
        let bypass = format!("\n[steering]\nbypass = [\"port={}\"]\n", self.server.port());
        self.edit(&[EDIT, &bypass].concat())?;
        self.reload_until("reloaded: ")?;
        self.new_flows_are(Path::Forwarded)?;
        self.edit(&[EDIT, WRONG].concat())?;
        self.reload_until("not reloaded, the running configuration stays in effect")?;
        self.new_flows_are(Path::Forwarded)?;
        self.edit(EDIT)?;
        self.reload_until("reloaded: ")?;
        self.new_flows_are(Path::Split)?;
        let (_, intact) = lasting.download(1_000_000, 1)?;
        ensure!(intact, "a flow was damaged by reloads");
        println!("The open flow continues.");
        Ok(())
    }

    fn reload_until(&self, word: &str) -> Result<()> {
        let count = |log: &str| log.matches(word).count();
        let log = || self.system.output("journalctl --output cat --unit pepsal");
        let before = count(&log()?);
        self.system.show("systemctl reload pepsal")?;
        eventually(PATIENCE, || log().is_ok_and(|log| count(&log) > before));
        self.system
            .show("journalctl --output cat --unit pepsal _COMM=pepsal --grep reloaded --lines 1")
    }

    /// Installs newer versions while connections are opened and used.
    fn upgrade(&self, successors: &Successors) -> Result<()> {
        shell::heading(&format!("Upgrade {UPGRADES} times under load"));
        let lasting = [self.session(Family::V4)?, self.session(Family::V6)?];
        let stop = AtomicBool::new(false);
        let flows = thread::scope(|scope| {
            let loads = [(Family::V4, 0), (Family::V6, 1_000_000)].map(|(family, seed)| {
                let stop = &stop;
                scope.spawn(move || self.load(family, seed, stop))
            });
            let upgraded = (1..=UPGRADES).try_for_each(|number| {
                self.upgrade_once(successors, number)?;
                for session in &lasting {
                    let (_, intact) = session.download(200_000, number.into())?;
                    ensure!(intact, "a flow that was open is damaged after upgrade {number}");
                }
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            let mut flows = 0;
            for load in loads {
                flows += load.join().expect("the load does not panic")?;
            }
            upgraded.map(|()| flows)
        })?;
        ensure!(flows > u64::from(UPGRADES), "there was no load");
        println!(
            "{flows} connections were made meanwhile: all were intercepted, none was refused, none was reset, and the {} \
             that were open all the while go on.",
            lasting.len()
        );
        self.system.show("systemctl status --no-pager --lines 0 pepsal")?;
        self.system.show("nft list chain inet gateway forward")?;
        drop(lasting);
        let processes = "cat /sys/fs/cgroup/system.slice/pepsal.service/pepsal.*/cgroup.procs | wc -l";
        eventually(PATIENCE, || {
            self.system.output(processes).is_ok_and(|count| count == "1")
        });
        println!("With their last flows the earlier versions have ended.");
        self.devices_are_untouched()?;
        ensure!(
            fs::read_to_string(self.root.file(CONFIGURATION))? == EDIT,
            "the upgrades changed an edited {CONFIGURATION}"
        );
        let restarts = self.system.property("pepsal", "NRestarts")?;
        ensure!(restarts == "0", "systemd restarted the daemon {restarts} times");
        Ok(())
    }

    fn upgrade_once(&self, successors: &Successors, number: u32) -> Result<()> {
        let before = self.system.property("pepsal", "MainPID")?;
        let package = self.root.take(&successors.make(number)?)?;
        self.system
            .show(&format!("apt-get install -qq --yes {package} >/dev/null"))?;
        fs::remove_file(self.root.file(&package))?;
        // invoke-rc.d(8) does not wait on a system that is starting, or has a unit that failed.
        eventually(PATIENCE, || {
            let property = |name| self.system.property("pepsal", name).unwrap_or_default();
            property("ActiveState") == "active" && property("MainPID") != before
        });
        let after = self.system.property("pepsal", "MainPID")?;
        println!("  pepsal.service is active: process {before} before, {after} now");
        Ok(())
    }

    /// Repeatedly connects, transfers and closes.
    fn load(&self, family: Family, seed: u64, stop: &AtomicBool) -> Result<u64> {
        let mut flows = 0;
        while !stop.load(Ordering::Relaxed) {
            let number = seed + flows;
            let direction = [Direction::Upload, Direction::Download][number as usize % 2];
            let transfer = Transfer::new(direction, 1 << (10 + number % 11)).seed(number);
            self.transfer(&transfer, self.server.address(family), Path::Split)
                .with_context(|| format!("connection {number} during upgrades"))?;
            flows += 1;
        }
        Ok(flows)
    }

    fn purge(&self, clean: &[String]) -> Result<()> {
        shell::heading("Remove, then purge");
        self.system.show("apt-get remove --yes pepsal")?;
        ensure!(
            self.root.file(CONFIGURATION).exists(),
            "removing took the configuration away"
        );
        self.new_flows_are(Path::Forwarded)?;
        self.system.show("apt-get purge --yes pepsal")?;
        let left: Vec<_> = self
            .root
            .files()?
            .into_iter()
            .filter(|path| !clean.contains(path))
            .collect();
        ensure!(left.is_empty(), "purging leaves {}", left.join(", "));
        ensure!(
            !fs::read_to_string(self.root.file("/etc/passwd"))?.contains("pepsal"),
            "purging leaves the user"
        );
        Ok(())
    }

    fn edit(&self, text: &str) -> Result<()> {
        println!("# cat >{CONFIGURATION} <<END\n{text}END");
        fs::write(self.root.file(CONFIGURATION), text).context("cannot edit the configuration")
    }

    fn session(&self, family: Family) -> Result<Session> {
        Session::open(
            &Connector::default(),
            &self.topology.client,
            self.server.address(family),
            &Cancel::default(),
        )
    }

    fn new_flows_are(&self, seen: Path) -> Result<()> {
        for family in Family::BOTH {
            self.transfer(&Transfer::download(100_000), self.server.address(family), seen)?;
        }
        println!(
            "  New connections to port {} are {}.",
            self.server.port(),
            match seen {
                Path::Split => "split",
                Path::Forwarded => "passed through untouched",
            }
        );
        Ok(())
    }

    fn transfer(&self, transfer: &Transfer, server: SocketAddr, seen: Path) -> Result<()> {
        let outcome = transfer.run(&self.topology.client, server)?;
        ensure!(outcome.intact, "a flow to {server} is damaged");
        let was = outcome.path();
        ensure!(was == seen, "a flow to {server} was {was:?}, and not {seen:?}");
        Ok(())
    }
}

/// A web server with one file.
struct Web {
    server: Child,
    folder: PathBuf,
}

impl Web {
    fn start(namespace: &Namespace) -> Result<Self> {
        const BYTES: usize = 20_000_000;
        let folder = cargo::target_dir().join("tmp/web");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("file"), vec![0; BYTES])?;
        let log = fs::File::create(folder.with_extension("log"))?;
        let server = namespace
            .command("python3")
            .args(["-u", "-m", "http.server", &HTTP.to_string()])
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot run python3")?;
        let web = Self { server, folder };
        let address = SocketAddr::new(Family::V4.server(), HTTP);
        eventually(PATIENCE, || {
            namespace.run(|| std::net::TcpStream::connect(address).is_ok())
        });
        Ok(web)
    }

    /// Path of a transfer that takes some seconds.
    fn download(&self, client: &Namespace) -> Command {
        let mut curl = client.command("curl");
        curl.args("--silent --show-error --fail --limit-rate 5M --output /dev/null --write-out".split(' '))
            .arg("%{size_download} bytes in %{time_total} s, status %{http_code}\n")
            .arg(format!("http://{}/file", Family::V4.server()));
        curl
    }

    /// The last request, with the client's address.
    fn log(&self) -> Result<String> {
        let log = fs::read_to_string(self.folder.with_extension("log"))?;
        Ok(log.lines().last().unwrap_or_default().to_owned())
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Copies of the package with increasing versions.
struct Successors {
    folder: PathBuf,
    control: String,
    version: String,
}

impl Successors {
    fn of(package: &path::Path) -> Result<Self> {
        let folder = cargo::target_dir().join("tmp/successor");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        shell::run(
            Command::new("dpkg-deb")
                .arg("--raw-extract")
                .args([package, &folder]),
        )?;
        let control = fs::read_to_string(folder.join("DEBIAN/control"))?;
        let version = control.lines().find(|line| line.starts_with("Version: "));
        let version = version.context("the package has no version")?.to_owned();
        Ok(Self {
            folder,
            control,
            version,
        })
    }

    /// Returns the path of one version.
    fn make(&self, number: u32) -> Result<PathBuf> {
        let version = format!("{}+{number}", self.version);
        fs::write(
            self.folder.join("DEBIAN/control"),
            self.control.replace(&self.version, &version),
        )?;
        let path = self.folder.with_extension("deb");
        let mut build = Command::new("dpkg-deb");
        build
            .args(["--root-owner-group", "-Znone", "--build"])
            .args([&self.folder, &path])
            .stdout(Stdio::null());
        shell::run(&mut build)?;
        Ok(path)
    }
}

impl Drop for Successors {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
        let _ = fs::remove_file(self.folder.with_extension("deb"));
    }
}
