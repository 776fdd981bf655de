//! Kernel configurations: whether a built one honours our fragments.
use crate::architecture::Architecture;
use crate::paths;
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::fs;

/// Options and their values; `n` where an option is to be absent.
pub type Options = HashMap<String, String>;

/// What the fragments for an architecture ask for; the architecture's own fragment has the last word.
pub fn fragments(architecture: Architecture) -> Result<Options> {
    let mut options = Options::new();
    for name in ["common", architecture.name()] {
        let path = paths::workspace().join(format!("resources/kernels/{name}.config"));
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        options.extend(parse(&text));
    }
    Ok(options)
}

/// The options that `config` does not honour, as lines of a configuration.
pub fn unmet(wanted: &Options, config: &str) -> Vec<String> {
    let built = parse(config);
    let mut unmet: Vec<_> = wanted
        .iter()
        .filter(|(option, value)| built.get(*option).map_or("n", String::as_str) != value.as_str())
        .map(|(option, value)| format!("{option}={value}"))
        .collect();
    unmet.sort();
    unmet
}

fn parse(text: &str) -> Options {
    text.lines()
        .filter_map(|line| match line.strip_prefix("# ") {
            Some(comment) => {
                let option = comment.strip_suffix(" is not set")?;
                option.starts_with("CONFIG_").then(|| (option.to_owned(), "n".to_owned()))
            }
            None => line.split_once('=').map(|(option, value)| (option.to_owned(), value.to_owned())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: &str = "# Base\nCONFIG_KVM=y\nCONFIG_LSM=\"landlock\"\n# CONFIG_VT is not set\n";

    #[test]
    fn an_option_that_is_to_be_off_may_be_off_or_absent() {
        let wanted = parse(WANTED);
        for rest in ["", "# CONFIG_VT is not set\n"] {
            assert!(unmet(&wanted, &format!("CONFIG_KVM=y\nCONFIG_LSM=\"landlock\"\n{rest}")).is_empty());
        }
    }

    #[test]
    fn missing_different_and_unwanted_options_are_named() {
        let built = "CONFIG_KVM=m\nCONFIG_VT=y\n";
        assert_eq!(unmet(&parse(WANTED), built), ["CONFIG_KVM=y", "CONFIG_LSM=\"landlock\"", "CONFIG_VT=n"]);
    }
}
