//! The data directory of `imcluster up`: where everything lies, and how files in it are replaced.
//!
//! ```text
//! DIR/lock               held by the one supervisor
//! DIR/members.json       who runs, for people and scripts
//! DIR/logs/NAME.log      what each process printed
//! DIR/store/             the embedded store's database
//! DIR/run/               between the processes: sockets, endpoints, secrets, configurations, the shard map
//! ```

use crate::platform::View;
use im_crds::ImCluster;
use rand::RngExt;
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The longest path of a unix socket, bytes (`sun_path` is 108 with its terminator).
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// A log that is larger than this when its process starts is set aside first.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// Where ports are looked for: below what the kernel hands out for outgoing connections, so that none of those takes the
/// port of a process that is being restarted.
const PORTS: std::ops::Range<u16> = 15_000..30_000;

/// Why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another supervisor holds the lock.
    #[error("another `imcluster up` (pid {pid}) uses {path}: stop it, or give this one its own --data-dir")]
    Locked {
        /// The data directory.
        path: PathBuf,
        /// Who holds it, as far as is known.
        pid: String,
    },
    /// A unix socket's path would be too long.
    #[error(
        "{path} is too long for the sockets in it ({bytes} bytes, at most {SOCKET_PATH_BYTES_MAX}): give a shorter --data-dir"
    )]
    TooLong {
        /// The longest socket's path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// A file does not hold what this program writes.
    #[error("{path} is damaged ({reason}): delete it, it is made anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No free port.
    #[error("no free port from {} to {} on 127.0.0.1", PORTS.start, PORTS.end)]
    NoPort,
}

trait At<T> {
    fn at(self, path: &Path) -> Result<T, DataDirError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, DataDirError> {
        self.map_err(|source| DataDirError::Io { path: path.to_owned(), source })
    }
}

/// Addresses that restarts keep, so that members find control and store again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoints {
    /// Where the control service listens.
    pub control: SocketAddr,
    /// Where the store member listens.
    pub store: SocketAddr,
}

/// What the tiers prove to each other that they belong together.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Secrets {
    /// Of a Link.
    pub link_token: String,
    /// Of the store member.
    pub store_token: String,
}

/// A data directory that exists.
#[derive(Clone, Debug)]
pub struct DataDir {
    root: PathBuf,
}

/// Held as long as the supervisor lives; the kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held, not read")] File);

impl DataDir {
    /// Makes the directory and what is in it, readable by its owner only.
    ///
    /// # Errors
    /// [`DataDirError`] when it can't be made, or its path is too long for a socket.
    pub fn create(root: &Path) -> Result<Self, DataDirError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for directory in [root.to_owned(), root.join("run"), root.join("logs")] {
            builder.create(&directory).at(&directory)?;
        }
        Self::open(root)
    }

    /// A data directory that some `imcluster up` made.
    ///
    /// # Errors
    /// [`DataDirError`] when it does not exist.
    pub fn open(root: &Path) -> Result<Self, DataDirError> {
        let data = Self { root: root.canonicalize().at(root)? };
        let longest = data.supervisor_socket();
        let bytes = longest.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(DataDirError::TooLong { path: longest, bytes });
        }
        Ok(data)
    }

    /// Takes the lock that makes this the only supervisor here.
    ///
    /// # Errors
    /// [`DataDirError::Locked`] with the other one's pid.
    pub fn lock(&self) -> Result<Lock, DataDirError> {
        let path = self.root.join("lock");
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).at(&path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
                return Err(DataDirError::Locked { path: self.root.clone(), pid });
            }
            Err(errno) => return Err(errno.into()).at(&path),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).at(&path)?;
        Ok(Lock(file))
    }

    /// The directory itself, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The embedded store's directory.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// The supervisor's socket.
    pub fn supervisor_socket(&self) -> PathBuf {
        self.root.join("run/supervisor.sock")
    }

    /// The socket at which control answers for its status.
    pub fn status_socket(&self) -> PathBuf {
        self.root.join("run/status.sock")
    }

    /// Where the console listens, as `{"address": …}`.
    pub fn console_json(&self) -> PathBuf {
        self.root.join("run/console.json")
    }

    /// The last good ImCluster.
    pub fn cluster_yaml(&self) -> PathBuf {
        self.root.join("run/imcluster.yaml")
    }

    /// The shard map.
    pub fn shard_map(&self) -> PathBuf {
        self.root.join("run/shardmap.json")
    }

    /// The copy of the shard map that members begin with.
    pub fn map_hint(&self) -> PathBuf {
        self.root.join("run/map-hint")
    }

    /// The configuration that a member is started with.
    pub fn config(&self, name: &str) -> PathBuf {
        self.root.join(format!("run/{name}.json"))
    }

    /// Opens a process's log for appending; a large one is set aside as `NAME.log.1` first.
    ///
    /// # Errors
    /// [`DataDirError::Io`].
    pub fn open_log(&self, name: &str) -> Result<File, DataDirError> {
        let path = self.root.join(format!("logs/{name}.log"));
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > LOG_BYTES_MAX) {
            fs::rename(&path, path.with_extension("log.1")).at(&path)?;
        }
        OpenOptions::new().append(true).create(true).mode(0o600).open(&path).at(&path)
    }

    /// The last good ImCluster, if there ever was one. A file that can't be read any more counts as none.
    pub fn last_good_cluster(&self) -> Option<ImCluster> {
        ImCluster::parse_yaml(&fs::read_to_string(self.cluster_yaml()).ok()?).ok()
    }

    /// The addresses of control and store; chosen at the first start, and again when something else took one meanwhile.
    /// Only the supervisor calls this, before it starts anything.
    ///
    /// # Errors
    /// [`DataDirError`].
    pub fn choose_endpoints(&self) -> Result<Endpoints, DataDirError> {
        let free = |address: &SocketAddr| TcpListener::bind(address).is_ok();
        if let Some(kept) = self.read_json::<Endpoints>("run/endpoints.json")?
            && free(&kept.control)
            && free(&kept.store)
        {
            return Ok(kept);
        }
        let control = free_address()?;
        let mut store = free_address()?;
        while store == control {
            store = free_address()?;
        }
        let endpoints = Endpoints { control, store };
        self.write_json("run/endpoints.json", &endpoints)?;
        Ok(endpoints)
    }

    /// The addresses that [`DataDir::choose_endpoints`] chose.
    ///
    /// # Errors
    /// [`DataDirError`], also when none were chosen yet.
    pub fn endpoints(&self) -> Result<Endpoints, DataDirError> {
        self.read_json("run/endpoints.json")?.ok_or_else(|| missing(&self.root.join("run/endpoints.json")))
    }

    /// The secrets; made at the first start.
    ///
    /// # Errors
    /// [`DataDirError`].
    pub fn secrets(&self) -> Result<Secrets, DataDirError> {
        if let Some(secrets) = self.read_json("run/secrets.json")? {
            return Ok(secrets);
        }
        let token = || format!("{:032x}", rand::rng().random::<u128>());
        let secrets = Secrets { link_token: token(), store_token: token() };
        self.write_json("run/secrets.json", &secrets)?;
        Ok(secrets)
    }

    /// Replaces `members.json` by who runs now.
    ///
    /// # Errors
    /// [`DataDirError::Io`].
    pub fn write_members(&self, view: &View) -> Result<(), DataDirError> {
        #[derive(Serialize)]
        struct Member<'a> {
            name: &'a str,
            role: crate::platform::Role,
            pid: u32,
            addresses: &'a BTreeMap<String, String>,
        }
        let members: Vec<Member<'_>> = view
            .processes
            .iter()
            .filter_map(|p| Some(Member { name: &p.name, role: p.role, pid: p.pid?, addresses: &p.addresses }))
            .collect();
        self.write_json("members.json", &members)
    }

    fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, DataDirError> {
        let path = self.root.join(name);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|error| DataDirError::Damaged { path, reason: error.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at(&path),
        }
    }

    fn write_json<T: Serialize + ?Sized>(&self, name: &str, value: &T) -> Result<(), DataDirError> {
        let path = self.root.join(name);
        let mut bytes = serde_json::to_vec_pretty(value).map_err(io::Error::other).at(&path)?;
        bytes.push(b'\n');
        write_atomically(&path, &bytes).at(&path)
    }
}

fn missing(path: &Path) -> DataDirError {
    DataDirError::Io { path: path.to_owned(), source: io::ErrorKind::NotFound.into() }
}

/// Replaces a file so that a reader sees either the old or the new content, whole, and only its owner can read it.
///
/// # Errors
/// What the system says; the old file is untouched then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = path.with_file_name(name);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&beside, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

fn free_address() -> Result<SocketAddr, DataDirError> {
    let mut random = rand::rng();
    (0..200)
        .map(|_| SocketAddr::from((Ipv4Addr::LOCALHOST, random.random_range(PORTS))))
        .find(|address| TcpListener::bind(address).is_ok())
        .ok_or(DataDirError::NoPort)
}
