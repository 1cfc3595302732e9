//! The journal: what was answered and is not in the SQLite file for good yet.
//!
//! Two files of a fixed size, written before they are used, so that a record costs one write and one fdatasync that has no metadata to
//! store. Records are numbered without a gap. They go behind each other into one file until all of the other file's are durable
//! elsewhere; then they go on at that one's start. What follows the last record of a file is older, and its number says so.
//!
//! A record: number (u64), length of the payload (u32), XXH3-64 of number and payload (u64), payload; little endian.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

/// Bytes of each of the two files.
pub(super) const FILE_BYTES: u64 = 12 << 20;
const HEADER_BYTES: usize = 20;

/// A record as found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) number: u64,
    pub(super) payload: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Journal {
    files: [Segment; 2],
    /// Where the next record goes.
    current: usize,
    /// The number of the last record.
    last: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    /// Where its last record ends.
    end: u64,
    /// The number of its last record.
    last: u64,
}

impl Journal {
    /// Opens or makes `<store>-journal0` and `1`. What they have behind `applied` is to be made durable elsewhere before anything is
    /// appended.
    ///
    /// # Errors
    /// See [`Journal::records_after`].
    pub(super) fn open(store: &Path, applied: u64) -> io::Result<Self> {
        let files = [Segment::open(&named(store, "-journal0"))?, Segment::open(&named(store, "-journal1"))?];
        let mut journal = Self { files, current: 0, last: applied, buffer: Vec::new() };
        journal.last = journal.records_after(applied)?.last().map_or(applied, |record| record.number);
        Ok(journal)
    }

    /// The number of the last record.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// The records behind `applied`, in order.
    ///
    /// # Errors
    /// The system's; and [`io::ErrorKind::InvalidData`] if records between `applied` and the first one found are missing.
    pub(super) fn records_after(&self, applied: u64) -> io::Result<Vec<Record>> {
        let mut found = Vec::new();
        for segment in &self.files {
            found.extend(segment.read()?.into_iter().filter(|record| record.number > applied));
        }
        found.sort_by_key(|record| record.number);
        if let Some((record, expected)) = found.iter().zip(applied + 1..).find(|(record, n)| record.number != *n) {
            let what = format!(
                "the journal goes on at record {}, the store's file ends before {expected}: they are not of one moment; \
                 restore the store's files together, the two journals with it",
                record.number
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(found)
    }

    /// Whether a payload of this length fits into the file at hand.
    pub(super) fn has_room(&self, payload: usize) -> bool {
        self.files[self.current].end + (HEADER_BYTES + payload) as u64 <= FILE_BYTES
    }

    /// Whether it is time to go on in the other file: what is left of this one is for the while that the other is not free yet.
    pub(super) fn is_half_full(&self) -> bool {
        self.files[self.current].end > FILE_BYTES / 2
    }

    /// Goes on in the other file if all of its records are durable elsewhere, that is up to `durable`.
    pub(super) fn turn(&mut self, durable: u64) {
        let other = 1 - self.current;
        if self.files[other].last <= durable {
            self.files[other].end = 0;
            self.current = other;
        }
    }

    /// Writes the next record and waits until it is durable. It must have room.
    ///
    /// # Errors
    /// The system's. What is on the disk is unknown then: the process must end and recover.
    pub(super) fn append(&mut self, payload: &[u8]) -> io::Result<u64> {
        let number = self.last + 1;
        // Room was asked for, and a file is far smaller than 4 GiB.
        let length = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.buffer.clear();
        self.buffer.extend_from_slice(&number.to_le_bytes());
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.extend_from_slice(&checksum(number, payload).to_le_bytes());
        self.buffer.extend_from_slice(payload);
        let segment = &mut self.files[self.current];
        segment.file.write_all_at(&self.buffer, segment.end)?;
        segment.file.sync_data()?;
        segment.end += self.buffer.len() as u64;
        (segment.last, self.last) = (number, number);
        Ok(number)
    }

    /// The next record is made durable elsewhere, and with it all before: nothing is written, its number is used up.
    pub(super) fn skip(&mut self) -> u64 {
        self.last += 1;
        // Behind a gap a file is not read any further.
        self.turn(self.last);
        self.last
    }
}

impl Segment {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() < FILE_BYTES {
            // Zeros rather than a hole: later writes then change nothing but data.
            file.write_all(&vec![0; FILE_BYTES as usize])?;
            file.sync_all()?;
        }
        Ok(Self { file, end: 0, last: 0 })
    }

    /// The run of records at the file's start.
    fn read(&self) -> io::Result<Vec<Record>> {
        let mut bytes = vec![0; FILE_BYTES as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        let mut records: Vec<Record> = Vec::new();
        let mut rest = bytes.as_slice();
        while let Some((record, behind)) = split_record(rest)
            && records.last().is_none_or(|last| record.number == last.number + 1)
        {
            rest = behind;
            records.push(record);
        }
        Ok(records)
    }
}

/// The record at the start of some bytes, if there is a whole one, and what follows it.
fn split_record(bytes: &[u8]) -> Option<(Record, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (sum, rest) = rest.split_first_chunk()?;
    let (payload, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let number = u64::from_le_bytes(*number);
    let is_whole = number > 0 && checksum(number, payload) == u64::from_le_bytes(*sum);
    is_whole.then(|| (Record { number, payload: payload.to_vec() }, rest))
}

fn checksum(number: u64, payload: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(&number.to_le_bytes());
    sum.update(payload);
    sum.digest()
}

fn named(store: &Path, ending: &str) -> PathBuf {
    let mut name = store.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A path whose journals go with the test.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new() -> Self {
            let directory =
                std::env::temp_dir().join(format!("im-journal-{}-{:x}", std::process::id(), rand::random::<u64>()));
            std::fs::create_dir(&directory).expect("a writable temporary directory");
            Self(directory.join("store"))
        }

        fn open(&self, applied: u64) -> (Journal, Vec<u64>) {
            let journal = Journal::open(&self.0, applied).expect("a journal");
            let found = journal.records_after(applied).expect("readable");
            (journal, found.into_iter().map(|record| record.number).collect())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = self.0.parent().map(std::fs::remove_dir_all);
        }
    }

    #[test]
    fn a_record_that_was_torn_or_damaged_ends_the_run() {
        let scratch = Scratch::new();
        let (mut journal, _) = scratch.open(0);
        for payload in [&b"one"[..], b"", b"three"] {
            journal.append(payload).expect("room");
        }
        let third = (2 * HEADER_BYTES + 3) as u64;
        let found = journal.records_after(1).expect("readable");
        assert_eq!(found.iter().map(|record| record.payload.as_slice()).collect::<Vec<_>>(), [&b""[..], b"three"]);
        for at in [third, third + 8, third + 12, third + HEADER_BYTES as u64] {
            let file = &journal.files[0].file;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("readable");
            file.write_all_at(&[byte[0] ^ 1], at).expect("writable");
            assert_eq!(scratch.open(0).1, [1, 2], "damaged at {at}");
            file.write_all_at(&byte, at).expect("writable");
        }
        assert_eq!(scratch.open(0).1, [1, 2, 3]);
    }

    #[test]
    fn files_of_different_moments_are_refused() {
        let scratch = Scratch::new();
        let (mut journal, _) = scratch.open(7);
        journal.append(b"eight").expect("room");
        assert_eq!(scratch.open(7).1, [8]);
        assert_eq!(scratch.open(9).1, [] as [u64; 0], "the store's file is newer");
        let error = Journal::open(&scratch.0, 5).expect_err("6 and 7 are missing");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// Whatever is appended, skipped, made durable and cut short by a crash: what is found is all that is not durable.
        #[test]
        fn what_is_not_durable_elsewhere_is_found(steps in proptest::collection::vec((0u8..8, 0usize..3_000_000), 1..40)) {
            let scratch = Scratch::new();
            let (mut journal, _) = scratch.open(0);
            let mut durable = 0;
            for (kind, size) in steps {
                match kind {
                    0..4 if journal.has_room(size) => { journal.append(&vec![kind; size])?; }
                    0..4 => {}
                    4 => durable = journal.skip(),
                    5 => journal.turn(durable),
                    6 => durable = journal.last().min(durable + (size as u64 % 4)),
                    _ => {
                        let (reopened, found) = scratch.open(durable);
                        prop_assert_eq!(found, (durable + 1..=journal.last()).collect::<Vec<_>>());
                        // Recovery makes all of it durable.
                        journal = reopened;
                        durable = journal.last();
                    }
                }
                let found = journal.records_after(durable)?;
                prop_assert_eq!(found.len() as u64, journal.last() - durable);
            }
        }
    }
}
