//! What live rooms are compared with: brokers that anybody can have, and a bare loop that writes the same bytes to the same sockets and does
//! nothing else.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::process::{Child, Command};

use crate::Outcome;
use crate::system::{Bench, Mosquitto, cpu_seconds, cpu_seconds_of_thread, free_addresses, listens};

/// The first processor is the server's alone; this process and all others have the rest.
const SERVERS_PROCESSOR: &str = "0";

/// The longest packet whose length takes one byte.
const SHORT_PACKET_BYTES_MAX: usize = 127;

/// A broker on the server's processor.
pub struct Peer {
    /// Where clients connect.
    pub address: SocketAddr,
    pid: u32,
    _process: Process,
}

enum Process {
    Mosquitto { _broker: Mosquitto },
    Other { _child: Child },
}

impl Peer {
    /// Starts one by its name.
    ///
    /// # Errors
    /// It is not installed, or does not listen.
    pub async fn start(name: &str, bench: &Bench) -> Outcome<Self> {
        match name {
            "mosquitto" => {
                let broker = Mosquitto::start(bench).await?;
                let (address, pid) = (broker.address, broker.pid());
                Self::ready(address, pid, Process::Mosquitto { _broker: broker }).await
            }
            "nats-server" => Self::nats(bench).await,
            "mochi" => Self::mochi(bench).await,
            _ => Err(format!("no such peer: {name}").into()),
        }
    }

    /// nats-server, MQTT 3.1.1.
    async fn nats(bench: &Bench) -> Outcome<Self> {
        let folder = bench.folder("nats")?;
        let [address, client] = free_addresses()?;
        let (file, store) = (folder.join("nats.conf"), folder.display());
        let text = format!(
            "server_name: bench\nlisten: \"{client}\"\njetstream {{store_dir: \"{store}\"}}\nmqtt {{listen: \"{address}\"}}\n"
        );
        std::fs::write(&file, text)?;
        Self::go("nats-server", &["-c", &file.to_string_lossy()], address, &folder).await
    }

    /// mochi, a broker in Go.
    async fn mochi(bench: &Bench) -> Outcome<Self> {
        let folder = bench.folder("mochi")?;
        let [address, web_socket, info] = free_addresses::<3>()?.map(|address| address.to_string());
        let arguments = ["-tcp", &address, "-ws", &web_socket, "-info", &info];
        Self::go("mochi", &arguments, address.parse()?, &folder).await
    }

    /// A program in Go, for one processor.
    async fn go(name: &str, arguments: &[&str], address: SocketAddr, folder: &Path) -> Outcome<Self> {
        let mut command = Command::new(name);
        command.args(arguments).env("GOMAXPROCS", "1").current_dir(folder);
        command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let child =
            command.spawn().map_err(|error| format!("{name}: {error}; e2e/cluster/tools.sh {name} builds it"))?;
        listens(address).await?;
        let pid = child.id().ok_or_else(|| format!("{name} ended"))?;
        Self::ready(address, pid, Process::Other { _child: child }).await
    }

    async fn ready(address: SocketAddr, pid: u32, process: Process) -> Outcome<Self> {
        give_servers_processor(pid).await?;
        Ok(Self { address, pid, _process: process })
    }

    /// User and system time that it used.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

/// Gives a process the processor that nothing else has.
pub async fn give_servers_processor(pid: u32) -> Outcome {
    set_processors(&["-a"], pid, SERVERS_PROCESSOR).await
}

/// Keeps this process, and what it starts, away from the servers' processor while `work` goes on.
pub async fn beside_servers<T>(work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    let last = std::thread::available_parallelism()?.get() - 1;
    if last == 0 {
        return Err("live rooms are measured with a processor for the server: this machine has only one".into());
    }
    let me = std::process::id();
    set_processors(&["-a"], me, &format!("1-{last}")).await?;
    let done = work.await;
    set_processors(&["-a"], me, &format!("0-{last}")).await?;
    done
}

async fn set_processors(options: &[&str], id: u32, processors: &str) -> Outcome {
    let mut command = Command::new("taskset");
    command.args(options).args(["-p", "-c", processors, &id.to_string()]).stdout(Stdio::null());
    if command.status().await?.success() { Ok(()) } else { Err("taskset failed; install util-linux".into()) }
}

/// One thread, on the servers' processor, that answers logins and then copies what one connection sends to all that subscribed: at once
/// when it was quiet, else so much later than the time before. It understands nothing; what it costs is what sockets cost.
pub struct BareLoop {
    /// Where clients connect.
    pub address: SocketAddr,
    thread_id: u32,
    is_over: Arc<AtomicBool>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl BareLoop {
    /// Starts it for so many viewers.
    pub async fn start(viewers: usize, coalesce: Duration) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, is_over) = (listener.local_addr()?, Arc::new(AtomicBool::new(false)));
        let trouble = Arc::<Mutex<Option<String>>>::default();
        let (sender, thread_id) = tokio::sync::oneshot::channel();
        let (over, told) = (is_over.clone(), trouble.clone());
        std::thread::spawn(move || {
            // Whoever started it waits for the number; if he is gone, so is the need for it.
            let _ = sender.send(thread_id_of_this());
            if let Err(error) = copy_to_all(&listener, viewers, coalesce, &over) {
                *told.lock() = Some(error.to_string());
            }
        });
        let thread_id = thread_id.await?.ok_or("/proc/thread-self names no thread")?;
        set_processors(&[], thread_id, SERVERS_PROCESSOR).await?;
        Ok(Self { address, thread_id, is_over, trouble })
    }

    /// User and system time that its thread used.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds_of_thread(self.thread_id)
    }

    /// Ends it.
    pub fn stop(self) -> Outcome {
        self.is_over.store(true, Ordering::Relaxed);
        let trouble = self.trouble.lock().take();
        trouble.map_or(Ok(()), |text| Err(format!("the bare loop: {text}").into()))
    }
}

impl Drop for BareLoop {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

fn thread_id_of_this() -> Option<u32> {
    std::fs::read_link("/proc/thread-self").ok()?.file_name()?.to_str()?.parse().ok()
}

fn copy_to_all(listener: &TcpListener, viewers: usize, coalesce: Duration, is_over: &AtomicBool) -> io::Result<()> {
    // The publisher comes first and subscribes nothing.
    let mut star = welcome(listener, false)?;
    let mut sockets = (0..viewers).map(|_| welcome(listener, true)).collect::<io::Result<Vec<_>>>()?;
    star.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut buffer = vec![0; 4 << 20];
    while !is_over.load(Ordering::Relaxed) {
        let read = match star.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            Err(error) => return Err(error),
        };
        let next = Instant::now() + coalesce;
        for socket in &mut sockets {
            socket.write_all(&buffer[..read])?;
        }
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Answers CONNECT, and SUBSCRIBE of who will subscribe.
fn welcome(listener: &TcpListener, subscribes: bool) -> io::Result<TcpStream> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let packets: &[&[u8]] = if subscribes { &[&[0x20, 2, 0, 0], &[0x90, 3, 0, 1, 0]] } else { &[&[0x20, 2, 0, 0]] };
    for answer in packets {
        let mut head = [0; 2];
        stream.read_exact(&mut head)?;
        if usize::from(head[1]) > SHORT_PACKET_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a login is longer than the bare loop understands"));
        }
        let mut body = [0; SHORT_PACKET_BYTES_MAX];
        stream.read_exact(&mut body[..usize::from(head[1])])?;
        stream.write_all(answer)?;
    }
    Ok(stream)
}
