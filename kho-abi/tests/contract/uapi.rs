//! The numbers and structs of `/dev/liveupdate` against the kernel's own header, where it is there.
//!
//! It is looked for in `$LIVEUPDATE_H`, in unpacked kernel sources under `/usr/src`, and among the system's headers.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::{env, fs};

use kho_abi::uapi::{self, CreateSession, Finish, GetName, PreserveFd, RetrieveFd, RetrieveSession};

const HEADER: &str = "include/uapi/linux/liveupdate.h";

/// Name, offset and size of each field.
type Fields = Vec<(String, usize, usize)>;

fn find() -> Option<PathBuf> {
    if let Some(named) = env::var_os("LIVEUPDATE_H") {
        return Some(named.into());
    }
    let sources = fs::read_dir("/usr/src").into_iter().flatten().flatten().map(|tree| tree.path().join(HEADER));
    sources.chain([PathBuf::from("/usr/include/linux/liveupdate.h")]).find(|path| path.is_file())
}

/// A C header of the plain sort: constants, enums of numbers or names, `_IO` numbers, structs of fixed-width fields.
struct Header {
    constants: BTreeMap<String, usize>,
    requests: BTreeMap<String, usize>,
    structs: BTreeMap<String, Fields>,
}

impl Header {
    fn parse(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = without_comments(&text).replace("\\\n", " ");
        let mut header = Self { constants: BTreeMap::new(), requests: BTreeMap::new(), structs: BTreeMap::new() };
        let mut open: Option<(String, Fields, usize)> = None;
        for line in text.lines().map(str::trim) {
            let words: Vec<_> = line.split([' ', '\t']).filter(|word| !word.is_empty()).collect();
            match (words.as_slice(), &mut open) {
                (["#define", name, value @ ..], _) => header.define(name, &value.concat()),
                (["struct", name, "{"], _) => open = Some(((*name).into(), vec![], 0)),
                (["};"], Some(_)) => {
                    let (name, mut fields, end) = open.take().unwrap();
                    fields.push(("(end)".into(), end.next_multiple_of(align(&fields)), 0));
                    header.structs.insert(name, fields);
                }
                ([kind, field], Some((_, fields, end))) => {
                    let (field, count) = header.dimension(field.trim_end_matches(';'));
                    let width = width(kind);
                    let offset = end.next_multiple_of(width);
                    fields.push((field, offset, width * count));
                    *end = offset + width * count;
                }
                ([name, "=", value], None) => header.define(name, value.trim_end_matches(',')),
                _ => {}
            }
        }
        header
    }

    fn define(&mut self, name: &str, value: &str) {
        if let Some(arguments) = value.strip_prefix("_IO(").and_then(|rest| rest.strip_suffix(')')) {
            let (kind, number) = arguments.split_once(',').unwrap();
            let request = self.value(kind).unwrap() << 8 | self.value(number).unwrap();
            self.requests.insert(name.into(), request);
        } else if let Some(value) = self.value(value) {
            self.constants.insert(name.into(), value);
        }
    }

    fn value(&self, text: &str) -> Option<usize> {
        match text.strip_prefix("0x") {
            Some(digits) => usize::from_str_radix(digits, 16).ok(),
            None => text.parse().ok().or_else(|| self.constants.get(text).copied()),
        }
    }

    fn dimension(&self, field: &str) -> (String, usize) {
        match field.trim_end_matches(']').split_once('[') {
            Some((name, count)) => (name.into(), self.value(count).unwrap()),
            None => (field.into(), 1),
        }
    }
}

fn without_comments(text: &str) -> String {
    let mut parts = text.split("/*");
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |kept, part| kept + part.split_once("*/").map_or("", |(_, rest)| rest))
}

fn width(kind: &str) -> usize {
    match kind {
        "__u8" => 1,
        "__u32" | "__s32" => 4,
        "__aligned_u64" => 8,
        _ => panic!("a field of type {kind}"),
    }
}

/// The alignment of a struct: that of its widest field, none of which is an array of anything but bytes.
fn align(fields: &Fields) -> usize {
    fields.iter().map(|(_, _, size)| if [4, 8].contains(size) { *size } else { 1 }).max().unwrap_or(1)
}

/// The fields of one of our structs, in the form of [`Header::parse`].
macro_rules! fields {
    ($type:ident { $($field:ident),* }) => {{
        let value = $type::default();
        assert_eq!(value.size as usize, size_of::<$type>());
        vec![
            $((stringify!($field).to_string(), offset_of!($type, $field), size_of_val(&value.$field)),)*
            ("(end)".to_string(), size_of::<$type>(), 0),
        ]
    }};
}

#[test]
fn numbers_and_structs_are_those_of_the_kernel() {
    let Some(path) = find() else {
        println!("skipped: no liveupdate.h here, name one in LIVEUPDATE_H");
        return;
    };
    let header = Header::parse(&path);
    let requests = [
        ("LIVEUPDATE_IOCTL_CREATE_SESSION", uapi::CREATE_SESSION),
        ("LIVEUPDATE_IOCTL_RETRIEVE_SESSION", uapi::RETRIEVE_SESSION),
        ("LIVEUPDATE_SESSION_FINISH", uapi::FINISH),
        ("LIVEUPDATE_SESSION_GET_NAME", uapi::GET_NAME),
        ("LIVEUPDATE_SESSION_PRESERVE_FD", uapi::PRESERVE_FD),
        ("LIVEUPDATE_SESSION_RETRIEVE_FD", uapi::RETRIEVE_FD),
    ];
    let requests = BTreeMap::from(requests.map(|(name, number)| (name.to_string(), number as usize)));
    assert_eq!(header.requests, requests, "{}", path.display());
    let structs = [
        ("liveupdate_ioctl_create_session", fields!(CreateSession { size, fd, name })),
        ("liveupdate_ioctl_retrieve_session", fields!(RetrieveSession { size, fd, name })),
        ("liveupdate_session_finish", fields!(Finish { size, reserved })),
        ("liveupdate_session_get_name", fields!(GetName { size, reserved, name })),
        ("liveupdate_session_preserve_fd", fields!(PreserveFd { size, fd, token })),
        ("liveupdate_session_retrieve_fd", fields!(RetrieveFd { size, fd, token })),
    ];
    let structs = BTreeMap::from(structs.map(|(name, fields)| (name.to_string(), fields)));
    assert_eq!(header.structs, structs, "{}", path.display());
    assert_eq!(header.constants["LIVEUPDATE_IOCTL_TYPE"], usize::from(uapi::IOCTL_TYPE));
    assert_eq!(header.constants["LIVEUPDATE_SESSION_NAME_LENGTH"], uapi::SESSION_NAME_LENGTH);
    println!("compared with {}", path.display());
}
