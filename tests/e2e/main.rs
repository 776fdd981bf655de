//! End-to-end tests: real guests on a real kernel's KVM, KHO and LUO, in the lab. Each file is a theme, each test boots a
//! host of its own, and the assertions are about what a guest or an operator would notice.
//!
//! Each is a function of the architecture, and written once.

/// Makes a test per architecture of each of these functions. One that is forgotten is never called, which the compiler reports.
macro_rules! on_each_architecture {
    [$($name:ident),+ $(,)?] => {
        on_each_architecture! { x86_64: X86_64, $($name)+ }
        on_each_architecture! { aarch64: Aarch64, $($name)+ }
    };
    ($architecture:ident: $variant:ident, $($name:ident)+) => {
        mod $architecture {
            $(
                #[test]
                fn $name() -> anyhow::Result<()> {
                    super::$name(tests::architecture::Architecture::$variant)
                }
            )+
        }
    };
}

/// The same for what takes minutes: a run on both architectures has these tests on the one that is named. A full run has them on
/// both, and a run on one architecture has them on that one.
macro_rules! on_one_architecture {
    (x86_64, $($name:ident)+) => { on_one_architecture! { x86_64: X86_64, aarch64: Aarch64, $($name)+ } };
    (aarch64, $($name:ident)+) => { on_one_architecture! { aarch64: Aarch64, x86_64: X86_64, $($name)+ } };
    ($first:ident: $first_variant:ident, $second:ident: $second_variant:ident, $($name:ident)+) => {
        mod long {
            use super::*;
            on_each_architecture! { $first: $first_variant, $($name)+ }
            mod second {
                use super::*;
                on_each_architecture! { $second: $second_variant, $($name)+ }
            }
        }
    };
}

mod after_commit;
mod balloon;
mod before_commit;
mod check;
mod console;
mod debian;
mod disks;
mod endings;
mod faults;
mod generations;
mod inspect;
mod kvm;
mod lab;
mod load;
mod memory;
mod network;
mod operators;
mod processors;
mod script;
mod time;
mod upgrade;
mod vsock;
