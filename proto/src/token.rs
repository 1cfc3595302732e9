//! What the tiers prove to each other that they belong together with: bearer tokens that can be exchanged while everybody runs.
//!
//! A file holds one token per line. The first is presented, every one is accepted, and the file is read again when it changes. So a
//! new token is added as the second line, put first once every process has read that, and the old one is removed in the end: at no
//! moment is there somebody whom another one does not know.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

/// How old what is known of the file may be.
const READ_AGAIN: Duration = Duration::from_secs(5);

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
pub struct SharedToken(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    file: Option<PathBuf>,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    tokens: Tokens,
    bearer: MetadataValue<Ascii>,
    looked_at: Instant,
}

impl Known {
    fn new(tokens: Tokens) -> Result<Self, TokenError> {
        Ok(Self { bearer: tokens.bearer()?, tokens, looked_at: Instant::now() })
    }

    fn read(path: &Path) -> Result<Self, TokenError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| TokenError::Read { path: path.to_owned(), source })?;
        Self::new(Tokens::parse(&text).ok_or(TokenError::Empty)?)
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
        let known = Mutex::new(Known::new(Tokens::parse(token).ok_or(TokenError::Empty)?)?);
        Ok(Self(Some(Arc::new(Shared { file: None, known }))))
    }

    /// The tokens of a file. What can't be used later leaves what was known.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn file(path: &Path) -> Result<Self, TokenError> {
        let known = Mutex::new(Known::read(path)?);
        Ok(Self(Some(Arc::new(Shared { file: Some(path.to_owned()), known }))))
    }

    /// What to present now, as the value of `authorization`; `None` = nothing.
    pub fn bearer(&self) -> Option<MetadataValue<Ascii>> {
        self.known(Instant::now(), |known| known.bearer.clone())
    }

    /// Whether whoever sent that is let in now.
    pub fn admits(&self, metadata: &MetadataMap) -> bool {
        let accepts = |known: &Known| bearer_of(metadata).is_some_and(|presented| known.tokens.accept(presented));
        self.known(Instant::now(), accepts).unwrap_or(true)
    }

    fn known<T>(&self, now: Instant, use_it: impl FnOnce(&Known) -> T) -> Option<T> {
        let shared = self.0.as_ref()?;
        let mut known = shared.known.lock();
        if let Some(file) = &shared.file
            && now.saturating_duration_since(known.looked_at) >= READ_AGAIN
        {
            match Known::read(file) {
                Ok(read) => {
                    if read.tokens != known.tokens {
                        tracing::info!(file = %file.display(), tokens = read.tokens.0.len(), "the tokens changed");
                    }
                    *known = read;
                }
                Err(error) => tracing::warn!(%error, "the tokens known before stay in force"),
            }
            known.looked_at = now;
        }
        Some(use_it(&known))
    }
}

#[cfg(test)]
mod tests {
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
        let write = |text: &str| std::fs::write(&path, text).expect("a writable temporary folder");
        write("old");
        let one = SharedToken::file(&path).expect("a token");
        let other = SharedToken::file(&path).expect("a token");
        let mut now = Instant::now();
        let presents = |who: &SharedToken, now| who.known(now, |known| known.tokens.0[0].clone()).expect("a token");
        let accepts = |who: &SharedToken, token: &str, now| who.known(now, |known| known.tokens.accept(token));
        let talk = |now| {
            assert_eq!(accepts(&other, &presents(&one, now), now), Some(true));
            assert_eq!(accepts(&one, &presents(&other, now), now), Some(true));
        };
        for (step, presented) in [("old\nnew\n", "old"), ("new\nold", "new"), ("new", "new")] {
            write(step);
            // One reads it now, the other still knows what it read before.
            now += READ_AGAIN * 2;
            presents(&one, now);
            talk(now - READ_AGAIN - Duration::from_secs(1));
            talk(now);
            assert_eq!(presents(&one, now), presented);
        }
        assert_eq!(accepts(&one, "old", now), Some(false));
        for broken in ["", "\n"] {
            write(broken);
            now += READ_AGAIN * 2;
            talk(now);
        }
        std::fs::remove_file(&path).expect("it is there");
        now += READ_AGAIN * 2;
        talk(now);
        assert!(matches!(SharedToken::file(&path), Err(TokenError::Read { .. })));
    }
}
