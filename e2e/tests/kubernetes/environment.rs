//! What `e2e/cluster/run.sh` says about the cluster that it brought up, by environment variables:
//!
//! | variable | meaning |
//! | --- | --- |
//! | `KUBECONFIG` | the cluster, as an administrator |
//! | `IM_E2E_SUITE` | `ci` or `all` |
//! | `IM_E2E_IMAGE`, `IM_E2E_IMAGE_OTHER` | two builds that the nodes have; `REPOSITORY:TAG`, of one repository |
//! | `IM_E2E_CHART` | the operator's chart as it belongs to those builds |
//! | `IM_E2E_POSTGRES` | URL of a PostgreSQL for pods, of a role that may make databases and roles |
//! | `IM_E2E_POSTGRES_NODE_PORT` | where it is reached on a node |
//! | `IM_E2E_NODES_HERE` | `1`: the nodes run on this machine; their pods' processes get signals, and pods reach this machine |
//! | `IM_NODE` | a node's address as seen from this machine; left out: its internal address |
//! | `HELM` | the helm program; left out: the one on `PATH` |
//! | `KEEP` | `1`: the namespaces of scenarios that failed are kept |

use std::{env, net::IpAddr, path::PathBuf};

use crate::support::TestResult;

/// Which scenarios run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Suite {
    /// What every change has to pass, within some twelve minutes.
    Ci,
    /// Everything.
    All,
}

/// Where the nodes of the cluster have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// Wherever.
    Anywhere,
    /// On this machine: signals are sent to processes of pods, or pods reach what the scenario serves.
    Here,
}

/// A container image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it is.
    pub repository: String,
    /// Which one.
    pub tag: String,
}

impl Image {
    fn parse(name: &str) -> TestResult<Self> {
        let (repository, tag) = name.rsplit_once(':').ok_or_else(|| format!("image {name}: write REPOSITORY:TAG"))?;
        Ok(Self { repository: repository.to_owned(), tag: tag.to_owned() })
    }

    /// As a pod names it.
    pub fn name(&self) -> String {
        format!("{}:{}", self.repository, self.tag)
    }
}

/// The cluster and what is at hand for it.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Which scenarios were asked for.
    pub suite: Suite,
    /// Namespaces of failed scenarios are kept, to be looked at.
    pub keep: bool,
    /// The image that is used, and another build of it.
    pub images: [Image; 2],
    /// The operator's chart.
    pub chart: PathBuf,
    /// The helm program.
    pub helm: PathBuf,
    /// Where node ports are reached; else at the first node's internal address.
    pub node: Option<IpAddr>,
}

impl Environment {
    /// Reads the environment; `None`, told on standard output, when it is not for a scenario of that suite, or for one that
    /// needs the nodes to be on this machine.
    ///
    /// # Errors
    /// A variable is missing or makes no sense.
    pub fn read(suite: Suite, nodes: Nodes) -> TestResult<Option<Self>> {
        let variable = |name: &str| env::var(name).map_err(|_| format!("{name} is not set; run this by `make e2e`"));
        let wanted = match env::var("IM_E2E_SUITE").as_deref() {
            Err(_) => {
                println!("SKIPPED: no Kubernetes cluster is at hand; `make e2e` brings one up and runs this");
                return Ok(None);
            }
            Ok("ci") => Suite::Ci,
            Ok("all") => Suite::All,
            Ok(other) => return Err(format!("IM_E2E_SUITE={other}: write ci or all").into()),
        };
        if suite > wanted {
            println!("SKIPPED: only in SUITE=all");
            return Ok(None);
        }
        if nodes == Nodes::Here && env::var("IM_E2E_NODES_HERE").as_deref() != Ok("1") {
            println!("SKIPPED: it needs nodes that run on this machine, and root (DRIVER=kind or host on Linux)");
            return Ok(None);
        }
        Ok(Some(Self {
            suite: wanted,
            keep: env::var("KEEP").is_ok_and(|keep| keep == "1"),
            images: [Image::parse(&variable("IM_E2E_IMAGE")?)?, Image::parse(&variable("IM_E2E_IMAGE_OTHER")?)?],
            chart: PathBuf::from(variable("IM_E2E_CHART")?),
            helm: env::var_os("HELM").map_or_else(|| "helm".into(), PathBuf::from),
            node: env::var("IM_NODE").ok().map(|address| address.parse()).transpose()?,
        }))
    }
}
