//! What an operator asks for when he gives a VM a disk.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// What the guest can be told of a disk's name has so many bytes.
pub const ID_MAX: usize = 20;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// The image: a regular file or a block device. Its path has no comma.
    pub path: PathBuf,
    /// The guest can only read.
    pub readonly: bool,
    /// What the guest is told of the disk's name (`/dev/disk/by-id/virtio-STR`).
    pub id: Option<String>,
    /// Bypass the host's page cache.
    pub direct: bool,
}

/// A disk option that is none.
#[derive(Debug, thiserror::Error)]
#[error("'{text}' is no disk: {reason}; expected PATH[,readonly][,id=STR][,direct]")]
pub struct BlockConfigError {
    text: String,
    reason: &'static str,
}

impl BlockConfig {
    /// The same with a path that means the same to the process that goes on with the VM under the next kernel, wherever it is
    /// started.
    pub fn absolute(self) -> Result<Self, BlockConfigError> {
        let refuse = |reason| BlockConfigError { text: self.to_string(), reason };
        let path = std::path::absolute(&self.path).map_err(|_| refuse("the current folder is unknown"))?;
        match path.to_str() {
            Some(text) if !text.contains(',') => Ok(Self { path, ..self }),
            _ => Err(refuse("the current folder's name has a comma or is not UTF-8; give the image's path in full")),
        }
    }
}

impl FromStr for BlockConfig {
    type Err = BlockConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| BlockConfigError { text: text.to_owned(), reason };
        let mut words = text.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or_else(|| refuse("there is no path"))?;
        let mut config = Self { path: path.into(), readonly: false, id: None, direct: false };
        for word in words {
            match word.split_once('=') {
                None if word == "readonly" && !config.readonly => config.readonly = true,
                None if word == "direct" && !config.direct => config.direct = true,
                Some(("id", id)) if config.id.is_none() => {
                    if id.is_empty() || id.len() > ID_MAX || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
                        return Err(refuse("an id has 1 to 20 printable ASCII characters, no space and no comma"));
                    }
                    config.id = Some(id.to_owned());
                }
                _ => return Err(refuse("it has a word that is unknown or there twice (a path cannot have a comma)")),
            }
        }
        Ok(config)
    }
}

impl fmt::Display for BlockConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, readonly, id, direct } = self;
        write!(out, "{}", path.display())?;
        if *readonly {
            write!(out, ",readonly")?;
        }
        if let Some(id) = id {
            write!(out, ",id={id}")?;
        }
        if *direct {
            write!(out, ",direct")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_option_round_trips() {
        for text in
            ["/a.img", "/a b,readonly", "/dev/sdb,id=root=1,direct", "x,readonly,id=0123456789abcdefghij,direct"]
        {
            assert_eq!(text.parse::<BlockConfig>().unwrap().to_string(), text);
        }
        let any_order: BlockConfig = "a,direct,readonly".parse().unwrap();
        assert_eq!(any_order.to_string(), "a,readonly,direct");
    }

    #[test]
    fn relative_path_is_taken_from_the_current_folder() {
        let here = std::env::current_dir().unwrap();
        let config: BlockConfig = "a.img,direct".parse().unwrap();
        assert_eq!(config.absolute().unwrap().to_string(), format!("{},direct", here.join("a.img").display()));
        let config: BlockConfig = "/a/b.img".parse().unwrap();
        assert_eq!(config.clone().absolute().unwrap(), config);
    }

    #[test]
    fn disk_option_with_unknown_repeated_or_impossible_words_is_refused() {
        for text in
            ["", ",readonly", "a,", "a,b", "a,readonly=1", "a,readonly,readonly", "a,id=", "a,id=x,id=y", "a,id=a b"]
        {
            assert!(text.parse::<BlockConfig>().is_err(), "{text}");
        }
        assert!("a,id=0123456789abcdefghijk".parse::<BlockConfig>().is_err());
        assert!("a,id=é".parse::<BlockConfig>().is_err());
    }
}
