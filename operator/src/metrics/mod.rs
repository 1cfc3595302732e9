//! Where the autoscaler's numbers come from, and what control exports.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`prometheus`] | asks Prometheus: the members' gauges with the time of each sample, queries of one's own |
//! | [`direct`] | reads the same gauges from the members themselves |
//! | [`round`] | one round of measuring: which of the two is asked for what |
//! | [`signals`] | what is known after many rounds, and who said so: pure |
//! | [`exported`] | control's own metrics |

pub mod direct;
pub mod exported;
pub mod prometheus;
pub mod round;
pub mod signals;

pub use direct::{SCRAPE_TIMEOUT, Sample, ScrapeError, get, scrape};
pub use exported::{ScalingMetrics, export};
pub use prometheus::{Endpoint, Prometheus, PrometheusError};
pub use round::{Request, Round, Target, measure};
pub use signals::Signals;

/// How measuring is set up, beside what the ImCluster says.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The Prometheus to ask where the ImCluster names none.
    pub prometheus: Option<Endpoint>,
    /// Whether files that the ImCluster names are read. Not in a cluster: they would be the operator's own, its
    /// service account's token for one, sent to an address that the author of the ImCluster chose.
    pub reads_files: bool,
}
