//! What the lab's switch sees: the frames between the host's network card and the network that the emulator provides, which
//! outlives the host's kernels.
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// So much of each frame is kept: the headers, and an ARP message.
pub const FRAME_KEPT: usize = 64;

const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
const MAGIC: u32 = 0xa1b2_c3d4;

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];

/// An Ethernet address.
pub type Address = [u8; 6];

/// The beginning of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

impl Frame {
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..offset + N)?.try_into().ok()
    }

    /// Who has sent it.
    pub fn sender(&self) -> Option<Address> {
        self.at(6)
    }

    /// Whether it is from that IPv4 address.
    pub fn is_from(&self, address: [u8; 4]) -> bool {
        self.at(12) == Some(IPV4) && self.at(26) == Some(address)
    }

    /// Whether it announces that an IPv4 address is at its sender's: a gratuitous ARP message.
    pub fn announces(&self, address: [u8; 4]) -> bool {
        let everybody = self.at(0) == Some([0xff; 6]);
        everybody && self.at(12) == Some(ARP) && self.at(28) == Some(address) && self.at(38) == Some(address)
    }
}

/// The frames in the emulator's file (of libpcap's format), which may still grow.
pub fn read(path: &Path) -> Result<Vec<Frame>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    frames(&bytes).with_context(|| format!("{} is not as expected", path.display()))
}

fn frames(bytes: &[u8]) -> Result<Vec<Frame>> {
    let Some((header, mut rest)) = bytes.split_at_checked(FILE_HEADER) else { return Ok(Vec::new()) };
    ensure!(header.starts_with(&MAGIC.to_ne_bytes()), "it is no capture of this machine's byte order");
    let mut frames = Vec::new();
    // What is not there as a whole is still being written.
    while let Some((record, later)) = rest.split_at_checked(RECORD_HEADER) {
        let length: [u8; 4] = record[8..12].try_into().context("a record has no length")?;
        let Some((frame, later)) = later.split_at_checked(u32::from_ne_bytes(length) as usize) else { break };
        frames.push(Frame(frame.to_vec()));
        rest = later;
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(records: &[&[u8]]) -> Vec<u8> {
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.resize(FILE_HEADER, 0);
        for record in records {
            bytes.extend([0; 8]);
            bytes.extend((record.len() as u32).to_ne_bytes());
            bytes.extend(1514_u32.to_ne_bytes());
            bytes.extend(*record);
        }
        bytes
    }

    #[test]
    fn frames_are_read_from_a_file_that_grows() {
        let whole = capture(&[&[1; 60], &[2; 20], &[3; 64]]);
        assert_eq!(frames(&whole).expect("a capture").len(), 3);
        for cut in 0..whole.len() {
            assert!(frames(&whole[..cut]).expect("a beginning").len() < 3, "{cut}");
        }
        assert!(frames(&[0; 24]).is_err());
    }

    #[test]
    fn a_gratuitous_arp_message_announces_and_a_question_does_not() {
        let mut message = [0; 60];
        message[..6].fill(0xff);
        message[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        message[12..14].copy_from_slice(&ARP);
        message[28..32].copy_from_slice(&[10, 0, 2, 15]);
        message[38..42].copy_from_slice(&[10, 0, 2, 2]);
        let announces = |message: &[u8]| frames(&capture(&[message])).expect("a capture")[0].announces([10, 0, 2, 15]);
        assert!(!announces(&message));
        message[41] = 15;
        assert!(announces(&message));
        message[0] = 0x52;
        assert!(!announces(&message));
    }
}
