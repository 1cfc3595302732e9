//! Values made of files (keys, certificates, tokens), made again when a file changes: nobody has to restart a process for them.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

/// How often the files are looked at for a change, at most.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A value, and how it is made of its files. Cloning `T` has to be cheap.
pub struct Reloaded<T> {
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T, String> + Send + Sync>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: T,
    modified: Vec<Option<SystemTime>>,
    /// `None`: to be looked at by the next call.
    looked: Option<Instant>,
}

impl<T: fmt::Debug> fmt::Debug for Reloaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloaded").field("files", &self.files).field("value", &self.state.lock().value).finish()
    }
}

impl<T: Clone> Reloaded<T> {
    /// Makes the value for the first time.
    ///
    /// # Errors
    /// What `make` says.
    pub fn new<E: Display>(
        files: &[&Path],
        make: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        let files: Vec<PathBuf> = files.iter().map(|file| (*file).to_owned()).collect();
        // Looked at before they are read: what changes in between is read once more.
        let modified = times(&files);
        let state = Mutex::new(State { value: make()?, modified, looked: Some(Instant::now()) });
        Ok(Self { files, make: Box::new(move || make().map_err(|error| error.to_string())), state })
    }

    /// The value now. Files that can't be used leave the value as it was, until they change again.
    pub fn get(&self) -> T {
        self.at(Instant::now())
    }

    /// Has the next call make the value again, whatever is known of the files.
    pub fn look_again(&self) {
        let mut state = self.state.lock();
        state.modified.clear();
        state.looked = None;
    }

    pub(crate) fn at(&self, now: Instant) -> T {
        let mut state = self.state.lock();
        if state.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= LOOK_INTERVAL) {
            state.looked = Some(now);
            let modified = times(&self.files);
            if modified != state.modified {
                state.modified = modified;
                match (self.make)() {
                    Ok(value) => {
                        tracing::info!(files = ?self.files, "changed and read again");
                        state.value = value;
                    }
                    Err(error) => tracing::error!(error, "what was read before stays in force"),
                }
            }
        }
        state.value.clone()
    }
}

fn times(files: &[PathBuf]) -> Vec<Option<SystemTime>> {
    files.iter().map(|file| std::fs::metadata(file).and_then(|metadata| metadata.modified()).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_follows_its_file_and_outlives_a_broken_one() {
        let path = std::env::temp_dir().join(format!("im-reload-{}", std::process::id()));
        let began = SystemTime::now();
        let write = |text: &str, second: u64| {
            std::fs::write(&path, text).expect("a writable temporary folder");
            // Two writes may share a tick of the file system's clock.
            let file = std::fs::File::options().write(true).open(&path).expect("it is there");
            file.set_modified(began + Duration::from_secs(second)).expect("its owner");
        };
        write("1", 1);
        let file = path.clone();
        let make = move || {
            let text = std::fs::read_to_string(&file).map_err(|error| error.to_string())?;
            text.parse::<u32>().map_err(|error| error.to_string())
        };
        let value = Reloaded::new(&[&path], make.clone()).expect("a number");
        let mut now = Instant::now();
        for (second, text, expected) in [(2, "2", 2), (3, "no number", 2), (4, "4", 4)] {
            write(text, second);
            let before = value.at(now);
            assert_ne!(before, second as u32, "not looked at yet");
            now += LOOK_INTERVAL * 2;
            assert_eq!(value.at(now), expected, "{text}");
        }
        std::fs::remove_file(&path).expect("it is there");
        now += LOOK_INTERVAL * 2;
        assert_eq!(value.at(now), 4);
        assert!(Reloaded::new(&[&path], make).is_err());
    }
}
