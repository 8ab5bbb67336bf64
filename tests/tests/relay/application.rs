//! Programs that others wrote.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use pepsal_tests::{Bed, Family, PATIENCE, eventually, is_listening};
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

use crate::{MIB, payload};

#[test]
fn curl_and_nginx_exchange_files() -> Result<()> {
    let bed = Bed::start(&[])?;
    let nginx = Nginx::start(&bed)?;
    let file = payload(9, 8 * MIB);
    let [down, source, up] = ["down", "source", "up"].map(|name| nginx.directory.path().join(name));
    fs::write(&down, &file)?;
    fs::write(&source, &file)?;
    for family in Family::BOTH {
        let url = format!("http://{}", SocketAddr::new(family.server(), Nginx::PORT));
        let curl = |arguments: &[&str]| {
            let options = [
                "--globoff",
                "--silent",
                "--show-error",
                "--fail",
                "--max-time",
                "30",
            ];
            run(bed.topology.client.command("curl").args(options).args(arguments))
        };
        let received = curl(&[&format!("{url}/down")])?;
        assert_eq!(xxh3_64(&received), xxh3_64(&file), "{family:?}");
        curl(&["--upload-file", &source.to_string_lossy(), &format!("{url}/up")])?;
        assert_eq!(xxh3_64(&fs::read(&up)?), xxh3_64(&file), "{family:?}");
        fs::remove_file(&up)?;
    }
    assert_eq!(bed.daemon.terminate()?.counter("finished"), 4);
    Ok(())
}

#[test]
fn iperf3_measures_both_directions() -> Result<()> {
    const PORT: u16 = 5201;
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        for direction in [None, Some("-R")] {
            let mut server = bed.topology.server.command("iperf3");
            let mut server = server
                .args(["-s", "-1"])
                .stdout(Stdio::null())
                .spawn()
                .map(Reaped)?;
            eventually(PATIENCE, || is_listening(&bed.topology.server, Family::V6, PORT));
            let mut client = bed.topology.client.command("iperf3");
            let client = client
                .args(["-J", "-n", "16M", "-c", &family.server().to_string()])
                .args(direction);
            let report = String::from_utf8(run(client)?)?;
            let received = report
                .split("\"sum_received\"")
                .nth(1)
                .context("a sum in the report")?;
            let bytes = received.split("\"bytes\":").nth(1).context("bytes in the sum")?;
            let bytes: usize = bytes.split(',').next().unwrap_or_default().trim().parse()?;
            // iperf3 stops reading when the control connection says so, which is not held up by what is under way.
            assert!(bytes >= MIB, "{family:?} {direction:?}: {bytes} bytes");
            ensure!(server.0.wait()?.success(), "iperf3 -s");
        }
    }
    // A control connection and a data connection each.
    assert_eq!(bed.daemon.terminate()?.counter("accepted"), 8);
    Ok(())
}

fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

/// A child that does not outlive the test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail only for a child that has been waited for already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nginx with a directory of its own, which it serves and lets be written.
struct Nginx {
    _process: Reaped,
    directory: TempDir,
}

impl Nginx {
    const PORT: u16 = 8080;

    fn start(bed: &Bed) -> Result<Self> {
        let directory = TempDir::new()?;
        let path = directory.path().display();
        let config = format!(
            "daemon off; master_process off; user root; pid {path}/pid; error_log stderr;
             events {{}}
             http {{
                 access_log off; client_max_body_size 0;
                 client_body_temp_path {path}/body; proxy_temp_path {path}/proxy; fastcgi_temp_path {path}/fastcgi;
                 uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;
                 server {{ listen {port}; listen [::]:{port}; root {path}; dav_methods PUT; }}
             }}",
            port = Self::PORT
        );
        let file = directory.path().join("nginx.conf");
        fs::write(&file, config)?;
        let process = bed
            .topology
            .server
            .command("nginx")
            .arg("-p")
            .arg(directory.path())
            .arg("-c")
            .arg(&file)
            .spawn();
        let nginx = Self {
            _process: Reaped(process.context("nginx")?),
            directory,
        };
        eventually(PATIENCE, || {
            is_listening(&bed.topology.server, Family::V6, Self::PORT)
        });
        Ok(nginx)
    }
}
