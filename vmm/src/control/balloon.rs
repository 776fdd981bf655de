//! The Varlink interface of a VM's balloon. Wire types, as in [`super::interface`].

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect;

use crate::device::virtio::balloon as device;

/// Something that a guest's driver tells of the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
pub struct Statistic {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: u64,
}

/// A balloon, as `Get` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct BalloonStatus {
    /// Bytes that the guest is asked to give back.
    pub target: u64,
    /// Bytes that it says it does without.
    pub actual: u64,
    /// Bytes of its memory that the host has set memory aside for.
    pub backed: u64,
    /// What its driver told last.
    pub statistics: Vec<Statistic>,
    /// How many milliseconds ago that was.
    pub statistics_age_ms: Option<u64>,
}

impl From<device::BalloonStatus> for BalloonStatus {
    fn from(status: device::BalloonStatus) -> Self {
        let device::BalloonStatus { target, actual, backed, statistics, statistics_age } = status;
        let named = statistics.into_iter().map(|(name, value)| Statistic { name: name.to_owned(), value });
        let age = statistics_age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        Self { target, actual, backed, statistics: named.collect(), statistics_age_ms: age }
    }
}

/// How a method fails.
#[derive(Clone, Debug, PartialEq, Eq, zlink::ReplyError, introspect::ReplyError)]
#[zlink(interface = "org.kho-vmm.Balloon1")]
pub enum BalloonError {
    /// The VM has no balloon.
    NoBalloon,
    /// It cannot be done now, or not so.
    OperationFailed {
        /// Why, with all causes.
        reason: String,
    },
}

// By hand, as for `MachineError`.
impl fmt::Display for BalloonError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBalloon => write!(out, "{}", device::BalloonError::None),
            Self::OperationFailed { reason } => write!(out, "{reason}"),
        }
    }
}

impl std::error::Error for BalloonError {}

/// The client's side of the interface.
#[zlink::proxy("org.kho-vmm.Balloon1")]
pub trait BalloonProxy {
    /// How the balloon is.
    async fn get(&mut self) -> zlink::Result<Result<BalloonStatus, BalloonError>>;
    /// Asks the guest to give so many bytes back.
    async fn set_target(&mut self, bytes: u64) -> zlink::Result<Result<(), BalloonError>>;
}
