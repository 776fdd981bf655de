//! The map of preserved pages, from `kho-v3` on: a radix tree whose leaves are bitmaps, a page each.
//!
//! A key is a page's number shifted right by its order, with one bit set above: the lower that bit, the larger the order. So
//! pages of all orders are in one tree. Of a key, the lower bits name a bit in a leaf, and each table above has a share of the
//! rest. Tables and leaves stay when they become empty.
//!
//! Defined in the kernel's `include/linux/kho/abi/kexec_handover.h`.
//!
//! ```
//! use kho_abi::kernel::{Image, Limits, PageSize, radix};
//!
//! let mut image = Image::new(PageSize::SMALL);
//! let root = radix::encode(&mut image, [(0x20_0000, 9), (0x1000, 0)]).expect("addresses that fit their orders");
//! let preserved = radix::decode(&image, root, &Limits::default(), "/map")?;
//! assert_eq!(preserved.by_order.into_iter().collect::<Vec<_>>(), [(0, 1), (9, 1)]);
//! assert_eq!(preserved.ranges.iter().collect::<Vec<_>>(), [0x1000..0x2000, 0x20_0000..0x40_0000]);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::collections::BTreeMap;
use alloc::format;

use super::memory::{Walk, words};
use super::{Error, Image, Limits, PageSize, PhysMem, Problem, Ranges};

/// What is preserved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preserved {
    /// How many blocks of 2^order pages there are, by order.
    pub by_order: BTreeMap<u32, u64>,
    /// All of it.
    pub ranges: Ranges,
    /// How many pages the map itself takes.
    pub map_pages: usize,
}

impl Preserved {
    /// Takes in `count` neighbours of an order.
    pub(super) fn add(&mut self, address: u64, order: u32, count: u64, page_size: PageSize) {
        let blocks = self.by_order.entry(order).or_default();
        *blocks = blocks.saturating_add(count);
        self.ranges.add(address, count << (page_size.shift() + order));
    }
}

/// The shape of the tree for a page size.
#[derive(Clone, Copy)]
struct Shape {
    page_size: PageSize,
}

impl Shape {
    /// The bit of a key that stands for order 0: `KHO_ORDER_0_LOG2`.
    fn order_0(self) -> u32 {
        64 - self.page_size.shift()
    }

    /// `KHO_TABLE_SIZE_LOG2`.
    fn table_bits(self) -> u32 {
        self.page_size.shift() - 3
    }

    /// `KHO_BITMAP_SIZE_LOG2`.
    fn leaf_bits(self) -> u32 {
        self.page_size.shift() + 3
    }

    /// The level of the root; leaves have level 0.
    fn top(self) -> u32 {
        (self.order_0() - self.leaf_bits() + 1).div_ceil(self.table_bits())
    }

    /// Where in a key the index into a table of that level begins.
    fn place(self, level: u32) -> u32 {
        (level - 1) * self.table_bits() + self.leaf_bits()
    }

    /// The largest order whose bit is not among those of a leaf. It is far beyond any kernel's.
    fn most_order(self) -> u32 {
        self.order_0() - self.leaf_bits()
    }

    /// The logarithm of the bytes of 2^order pages.
    fn block(self, order: u32) -> u32 {
        self.page_size.shift() + order
    }

    /// The key of 2^order pages; None where there cannot be such.
    fn encode(self, address: u64, order: u32) -> Option<u64> {
        let fits = order <= self.most_order() && address & ((1 << self.block(order)) - 1) == 0;
        fits.then(|| 1 << (self.order_0() - order) | address >> self.block(order))
    }

    /// Address and order of a leaf's first pages, by the part of their keys that leads to the leaf.
    fn decode(self, key: u64) -> Option<(u64, u32)> {
        let bit = key.checked_ilog2()?;
        let order = self.order_0().checked_sub(bit).filter(|&order| order <= self.most_order())?;
        Some(((key ^ 1 << bit) << self.block(order), order))
    }
}

/// Reads the tree whose first table is at `root`. `path` is how one gets there.
///
/// # Errors
/// When it leads out of memory or in circles, holds what no page has for a key, or is larger than `limits`.
pub fn decode(memory: &dyn PhysMem, root: u64, limits: &Limits, path: &str) -> Result<Preserved, Error> {
    let shape = Shape { page_size: memory.page_size() };
    let mut reading =
        Reading { memory, shape, limits, path, walk: Walk::default(), runs: 0, preserved: Preserved::default() };
    reading.table(root, shape.top(), 0)?;
    reading.preserved.map_pages = reading.walk.pages();
    Ok(reading.preserved)
}

struct Reading<'a> {
    memory: &'a dyn PhysMem,
    shape: Shape,
    limits: &'a Limits,
    path: &'a str,
    walk: Walk,
    runs: usize,
    preserved: Preserved,
}

impl Reading<'_> {
    fn page(&mut self, address: u64) -> Result<alloc::vec::Vec<u8>, Error> {
        self.walk.page(self.memory, address, "a page of the map", self.limits, self.path)
    }

    /// The recursion is as deep as the tree: at most six tables.
    fn table(&mut self, address: u64, level: u32, key: u64) -> Result<(), Error> {
        let page = self.page(address)?;
        for (index, next) in words(&page).enumerate().filter(|&(_, next)| next != 0) {
            let place = self.shape.place(level);
            // The root's table has more entries than keys have bits.
            let key =
                (index as u64).checked_shl(place).filter(|&part| part >> place == index as u64).map(|part| key | part);
            let key = key.ok_or_else(|| self.no_page(address, index))?;
            if level == 1 { self.leaf(next, key)? } else { self.table(next, level - 1, key)? }
        }
        Ok(())
    }

    fn no_page(&self, address: u64, index: usize) -> Error {
        Error::invalid(self.path, "an entry", format!("of the map at {address:#x}, number {index}, stands for no page"))
    }

    /// Neighbours are taken in together.
    fn leaf(&mut self, address: u64, key: u64) -> Result<(), Error> {
        let page = self.page(address)?;
        let mut run: Option<(u64, u32, u64)> = None;
        for (number, word) in words(&page).enumerate().filter(|&(_, word)| word != 0) {
            let (start, order) = self.shape.decode(key).ok_or_else(|| self.no_page(address, number))?;
            let mut left = word;
            while left != 0 {
                let first = left.trailing_zeros();
                let count = (left >> first).trailing_ones();
                left &= u64::MAX.checked_shl(first + count).unwrap_or_default();
                let index = number as u64 * 64 + u64::from(first);
                self.take(&mut run, (start + (index << self.shape.block(order)), order, count.into()))?;
            }
        }
        run.into_iter().try_for_each(|run| self.keep(run))
    }

    /// Lengthens the run, or begins another.
    fn take(&mut self, run: &mut Option<(u64, u32, u64)>, found: (u64, u32, u64)) -> Result<(), Error> {
        match run {
            Some((start, order, count)) if found.0 - *start == *count << self.shape.block(*order) => {
                *count += found.2;
                Ok(())
            }
            _ => run.replace(found).into_iter().try_for_each(|run| self.keep(run)),
        }
    }

    fn keep(&mut self, (address, order, count): (u64, u32, u64)) -> Result<(), Error> {
        self.runs += 1;
        if self.runs > self.limits.entries {
            let what = "runs of preserved pages";
            return Err(Error::new(self.path, Problem::TooMany { what, max: self.limits.entries }));
        }
        self.preserved.add(address, order, count, self.shape.page_size);
        Ok(())
    }
}

/// Writes a tree with these pages, given as address and order, and returns where its first table is. None when an address does
/// not fit its order.
pub fn encode(image: &mut Image, pages: impl IntoIterator<Item = (u64, u32)>) -> Option<u64> {
    let shape = Shape { page_size: image.page_size() };
    let size = shape.page_size.as_usize();
    let root = image.allocate(size);
    for (address, order) in pages {
        let key = shape.encode(address, order)?;
        let mut table = root;
        for level in (1..=shape.top()).rev() {
            let index = key >> shape.place(level) & ((1 << shape.table_bits()) - 1);
            let entry = table + index * 8;
            let mut next = [0; 8];
            image.read(entry, &mut next).ok()?;
            if next == [0; 8] {
                next = image.allocate(size).to_le_bytes();
                image.write(entry, &next);
            }
            table = u64::from_le_bytes(next);
        }
        let bit = key & ((1 << shape.leaf_bits()) - 1);
        let mut byte = [0];
        image.read(table + bit / 8, &mut byte).ok()?;
        image.write(table + bit / 8, &[byte[0] | 1 << (bit % 8)]);
    }
    Some(root)
}
