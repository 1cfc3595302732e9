//! What the tiers prove to each other that they belong together with: bearer tokens that can be exchanged while everybody runs.
//!
//! A file holds one token per line. The first is presented, every one is accepted, and the file is read again when it changes. So a
//! new token is added as the second line, put first once every process has read that, and the old one is removed in the end: at no
//! moment is there somebody whom another one does not know.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

use crate::reload::Reloaded;

/// Tokens of which the first is presented and each is accepted.
#[derive(Clone, PartialEq, Eq)]
pub struct Tokens(Vec<String>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({})", self.0.len())
    }
}

impl Tokens {
    /// The lines of a text; `None` if all are empty.
    pub fn parse(text: &str) -> Option<Self> {
        let lines: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
        (!lines.is_empty()).then_some(Self(lines))
    }

    /// Whether `presented` is one of them. The time that it takes tells lengths only.
    pub fn accept(&self, presented: &str) -> bool {
        let same = |token: &String| {
            let differs = token.bytes().zip(presented.bytes()).fold(0, |differs, (a, b)| differs | (a ^ b));
            token.len() == presented.len() && std::hint::black_box(differs) == 0
        };
        self.0.iter().fold(false, |found, token| found | same(token))
    }

    /// As the value of `authorization`.
    fn bearer(&self) -> Result<MetadataValue<Ascii>, TokenError> {
        let first = self.0.first().ok_or(TokenError::Empty)?;
        let mut value = MetadataValue::try_from(format!("Bearer {first}")).map_err(|_| TokenError::Unprintable)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The token of an `authorization`.
pub fn bearer_of(metadata: &MetadataMap) -> Option<&str> {
    metadata.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Why there is no token to present.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file can't be read.
    #[error("cannot read the token in {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is none in it.
    #[error("there is no token: give at least one line")]
    Empty,
    /// It can't be sent.
    #[error("a token has characters that can't be sent: use printable ASCII")]
    Unprintable,
}

/// What a process presents and accepts; clones share it.
#[derive(Clone, Debug, Default)]
pub struct SharedToken(Option<Arc<Reloaded<Arc<Known>>>>);

#[derive(Debug)]
struct Known {
    tokens: Tokens,
    bearer: MetadataValue<Ascii>,
}

impl Known {
    fn new(text: &str) -> Result<Arc<Self>, TokenError> {
        let tokens = Tokens::parse(text).ok_or(TokenError::Empty)?;
        Ok(Arc::new(Self { bearer: tokens.bearer()?, tokens }))
    }

    fn read(path: &Path) -> Result<Arc<Self>, TokenError> {
        let text = std::fs::read_to_string(path);
        Self::new(&text.map_err(|source| TokenError::Read { path: path.to_owned(), source })?)
    }
}

impl SharedToken {
    /// Nothing is presented and everybody is let in.
    pub fn none() -> Self {
        Self(None)
    }

    /// A token that stays as it is.
    ///
    /// # Errors
    /// [`TokenError::Empty`], [`TokenError::Unprintable`].
    pub fn fixed(token: &str) -> Result<Self, TokenError> {
        let token = token.to_owned();
        Ok(Self(Some(Arc::new(Reloaded::new(&[], move || Known::new(&token))?))))
    }

    /// The tokens of a file. What can't be used later leaves what was known.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn file(path: &Path) -> Result<Self, TokenError> {
        let file = path.to_owned();
        Ok(Self(Some(Arc::new(Reloaded::new(&[path], move || Known::read(&file))?))))
    }

    /// What to present now, as the value of `authorization`; `None` = nothing.
    pub fn bearer(&self) -> Option<MetadataValue<Ascii>> {
        self.0.as_ref().map(|known| known.get().bearer.clone())
    }

    /// Whether whoever sent that is let in now.
    pub fn admits(&self, metadata: &MetadataMap) -> bool {
        let Some(known) = &self.0 else { return true };
        bearer_of(metadata).is_some_and(|presented| known.get().tokens.accept(presented))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::{Duration, Instant, SystemTime};

    use super::*;

    fn metadata(token: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", format!("Bearer {token}").parse().expect("ASCII"));
        metadata
    }

    #[test]
    fn every_line_is_accepted_and_the_first_is_presented() {
        let tokens = Tokens::parse("\n new \r\nold\n").expect("two tokens");
        assert!(tokens.accept("new") && tokens.accept("old"));
        for wrong in ["", "ne", "newer", "new\nold", "nex"] {
            assert!(!tokens.accept(wrong), "{wrong:?}");
        }
        assert_eq!(tokens.bearer().expect("ASCII"), "Bearer new");
        assert_eq!(Tokens::parse(" \n"), None);
        assert_eq!(format!("{tokens:?}"), "Tokens(2)", "it is a secret");
    }

    #[test]
    fn who_has_no_token_lets_everybody_in() {
        let open = SharedToken::none();
        assert!(open.admits(&MetadataMap::new()) && open.bearer().is_none());
        let closed = SharedToken::fixed("a").expect("a token");
        assert!(!closed.admits(&MetadataMap::new()) && closed.admits(&metadata("a")));
        assert!(matches!(SharedToken::fixed(" "), Err(TokenError::Empty)));
        assert!(matches!(SharedToken::fixed("a\u{7f}"), Err(TokenError::Unprintable)));
    }

    /// Two processes read the file at different times; whatever the order, each presents what the other accepts.
    #[test]
    fn an_exchange_in_three_steps_shuts_nobody_out() {
        let path = std::env::temp_dir().join(format!("im-token-{}", std::process::id()));
        let began = SystemTime::now();
        let writes = Cell::new(0);
        let write = |text: &str| {
            writes.set(writes.get() + 1);
            std::fs::write(&path, text).expect("a writable temporary folder");
            // Two writes may share a tick of the file system's clock.
            let file = std::fs::File::options().write(true).open(&path).expect("it is there");
            file.set_modified(began + Duration::from_secs(writes.get())).expect("its owner");
        };
        write("old");
        let one = SharedToken::file(&path).expect("a token");
        let other = SharedToken::file(&path).expect("a token");
        let mut now = Instant::now();
        let known = |who: &SharedToken, now| who.0.as_ref().expect("there are tokens").at(now);
        let presents = |who: &SharedToken, now| known(who, now).tokens.0[0].clone();
        let accepts = |who: &SharedToken, token: &str, now| known(who, now).tokens.accept(token);
        let talk = |now| {
            assert!(accepts(&other, &presents(&one, now), now));
            assert!(accepts(&one, &presents(&other, now), now));
        };
        let later = Duration::from_secs(10);
        for (step, presented) in [("old\nnew\n", "old"), ("new\nold", "new"), ("new", "new")] {
            write(step);
            // One reads it now, the other still knows what it read before.
            now += later;
            presents(&one, now);
            talk(now - later);
            talk(now);
            assert_eq!(presents(&one, now), presented);
        }
        assert!(!accepts(&one, "old", now));
        for broken in ["", "\n"] {
            write(broken);
            now += later;
            talk(now);
        }
        std::fs::remove_file(&path).expect("it is there");
        now += later;
        talk(now);
        assert!(matches!(SharedToken::file(&path), Err(TokenError::Read { .. })));
    }
}
