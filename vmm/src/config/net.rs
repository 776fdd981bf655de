//! What an operator asks for when he gives a VM a network.

use std::fmt;
use std::str::FromStr;

/// The name of a network interface has less than so many bytes (IFNAMSIZ, with its NUL).
const NAME_SIZE: usize = 16;

/// A network device's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// An address for a VM's network of that number: the same on every host and at every start, locally administered, and
    /// different from others' as far as 40 bits go.
    pub fn derived(name: &str, number: u64) -> Self {
        // FNV-1a: it has to spread, not to withstand.
        let hash = name
            .bytes()
            .chain([0])
            .chain(number.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let [_, a, b, c, d, e, ..] = (hash ^ (hash >> 40)).to_le_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// Whether one device can have it: neither a group's nor nobody's.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([a, b, c, d, e, f]) = self;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The tap on the host that it is plugged into. It exists already.
    pub tap: String,
    /// Its address; one is derived from the VM's name where the operator gives none.
    pub mac: Option<MacAddress>,
}

impl NetConfig {
    /// The same with an address: one derived from the VM's name and the network's number where the operator has given none.
    pub fn with_address(&self, name: &str, number: u64) -> Self {
        let Self { tap, mac } = self;
        let mac = mac.unwrap_or_else(|| MacAddress::derived(name, number));
        Self { tap: tap.clone(), mac: Some(mac) }
    }
}

/// A network option that is none.
#[derive(Debug, thiserror::Error)]
#[error("'{text}' is no network: {reason}; expected tap=NAME[,mac=XX:XX:XX:XX:XX:XX]")]
pub struct NetConfigError {
    text: String,
    reason: &'static str,
}

impl FromStr for NetConfig {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| NetConfigError { text: text.to_owned(), reason };
        let (mut tap, mut mac) = (None, None);
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("tap", name)) if tap.is_none() => {
                    let fits = (1..NAME_SIZE).contains(&name.len()) && !matches!(name, "." | "..");
                    // What the kernel refuses in a name, and what it replaces.
                    if !fits || !name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte)) {
                        return Err(refuse("that is no name of a network interface"));
                    }
                    tap = Some(name.to_owned());
                }
                Some(("mac", address)) if mac.is_none() => {
                    mac =
                        Some(parse_mac(address).ok_or_else(|| refuse("that is no address that one device can have"))?);
                }
                _ => return Err(refuse("it has a word that is unknown or there twice")),
            }
        }
        Ok(Self { tap: tap.ok_or_else(|| refuse("there is no tap"))?, mac })
    }
}

fn parse_mac(text: &str) -> Option<MacAddress> {
    let mut bytes = [0; 6];
    let mut words = text.split(':');
    for byte in &mut bytes {
        // `from_str_radix` takes a sign, too.
        let word = words.next().filter(|word| word.len() == 2 && word.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(word, 16).ok()?;
    }
    let mac = MacAddress(bytes);
    (words.next().is_none() && mac.is_unicast()).then_some(mac)
}

impl fmt::Display for NetConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tap, mac } = self;
        write!(out, "tap={tap}")?;
        if let Some(mac) = mac {
            write!(out, ",mac={mac}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn network_option_round_trips() {
        for text in ["tap=tap0", "tap=web-1.2,mac=02:00:00:00:00:01", "tap=abcdefghijklmno,mac=fe:dc:ba:98:76:54"] {
            assert_eq!(text.parse::<NetConfig>().unwrap().to_string(), text);
        }
        let any_order: NetConfig = "mac=0A:0b:00:00:00:01,tap=x".parse().unwrap();
        assert_eq!(any_order.to_string(), "tap=x,mac=0a:0b:00:00:00:01");
    }

    #[test]
    fn network_option_with_unknown_repeated_or_impossible_words_is_refused() {
        for text in [
            "",
            "tap0",
            "tap=",
            "tap=a/b",
            "tap=a b",
            "tap=tap%d",
            "tap=..",
            "tap=abcdefghijklmnop",
            "tap=a,tap=b",
            "tap=a,",
            "tap=a,b",
            "mac=02:00:00:00:00:01",
            "tap=a,mac=",
            "tap=a,mac=02:00:00:00:00",
            "tap=a,mac=02:00:00:00:00:01:02",
            "tap=a,mac=02:00:00:00:00:+1",
            "tap=a,mac=02:00:00:00:00:1",
            "tap=a,mac=00:00:00:00:00:00",
            "tap=a,mac=01:00:00:00:00:01",
            "tap=a,mac=ff:ff:ff:ff:ff:ff",
        ] {
            assert!(text.parse::<NetConfig>().is_err(), "{text}");
        }
    }

    #[test]
    fn derived_addresses_are_stable_local_unicast_and_differ() {
        // Never another: it would change under a guest that is started anew.
        assert_eq!(MacAddress::derived("web", 1).to_string(), "02:76:d0:f0:8b:0a");
        let mut seen = BTreeSet::new();
        for vm in 0..1000 {
            for number in 0..4 {
                let mac = MacAddress::derived(&format!("vm{vm}"), number);
                assert!(mac.is_unicast() && mac.0[0] & 2 != 0, "{mac}");
                assert!(seen.insert(mac.0), "{mac}");
            }
        }
    }
}
