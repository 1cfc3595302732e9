//! Who a client is: JSON Web Tokens for users, service tokens for servers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;

use crate::config::AuthConfig;
use crate::mqtt::Reason;
use crate::session::{ConnectRefused, Identity};
use im_proto::reload::Reloaded;

/// Why authentication can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A file can't be read.
    #[error("cannot read {path}: {error}; check the paths below auth")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file without a usable key.
    #[error("{path} holds no usable key: {what}")]
    Keys {
        /// Which file.
        path: PathBuf,
        /// What was expected.
        what: String,
    },
}

/// What a valid token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The user.
    pub user: String,
    /// When the proof ends, Unix seconds; `None` = never.
    pub expires_unix_s: Option<u64>,
}

/// Checks passwords and bearer tokens.
pub struct Auth {
    users: Users,
    services: Option<Reloaded<Arc<Vec<String>>>>,
}

enum Users {
    Insecure,
    Jwt(Box<Jwt>),
}

struct Jwt {
    audience: Option<String>,
    issuer: Option<String>,
    keys: Reloaded<Arc<Vec<Key>>>,
}

#[derive(Clone)]
struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
}

impl Auth {
    /// Reads the keys and service tokens.
    ///
    /// # Errors
    /// [`AuthError`] if a file is missing or holds nothing usable.
    pub fn new(config: &AuthConfig, service_tokens: Option<&Path>) -> Result<Self, AuthError> {
        let users = match config {
            AuthConfig::Insecure {} => {
                tracing::warn!(
                    "auth is INSECURE: every password is taken; never let this gateway be reached from outside"
                );
                Users::Insecure
            }
            AuthConfig::Jwt { keys_file, jwks_file, audience, issuer } => {
                let (path, is_key_set) = match (keys_file, jwks_file) {
                    (_, Some(path)) => (path.clone(), true),
                    (Some(path), None) => (path.clone(), false),
                    (None, None) => {
                        return Err(AuthError::Keys {
                            path: PathBuf::new(),
                            what: "give keysFile or jwksFile".to_owned(),
                        });
                    }
                };
                let file = path.clone();
                let keys = Reloaded::new(&[&path], move || read_keys(&file, is_key_set).map(Arc::new))?;
                Users::Jwt(Box::new(Jwt { audience: audience.clone(), issuer: issuer.clone(), keys }))
            }
        };
        let services = service_tokens.map(|path| {
            let file = path.to_owned();
            Reloaded::new(&[path], move || read_service_tokens(&file).map(Arc::new))
        });
        let services = services.transpose()?;
        Ok(Self { users, services })
    }

    /// Proves `user` by the password of a CONNECT; `now_ms` is the session's clock, on which the identity then ends.
    ///
    /// # Errors
    /// The reason for the CONNACK.
    pub fn connect(&self, user: &str, password: Option<&[u8]>, now_ms: u64) -> Result<Identity, ConnectRefused> {
        let refused = |reason, text: &str| ConnectRefused { reason, text: text.to_owned() };
        let Users::Jwt(jwt) = &self.users else { return Ok(Identity { expires_at_ms: None }) };
        let token = password.and_then(|password| std::str::from_utf8(password).ok());
        let token = token.ok_or_else(|| refused(Reason::BadCredentials, "the password must be a JSON Web Token"))?;
        let proof = jwt.check(token).map_err(|(reason, text)| refused(reason, &text))?;
        if proof.user != user {
            return Err(refused(Reason::BadCredentials, "the token's sub is not the user name"));
        }
        let now_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let left_ms = |at_s: u64| at_s.saturating_mul(1_000).saturating_sub(now_unix_ms);
        let expires_at_ms = proof.expires_unix_s.map(|at_s| now_ms.saturating_add(left_ms(at_s)));
        Ok(Identity { expires_at_ms })
    }

    /// The user of an HTTP bearer token.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn bearer_user(&self, token: &str) -> Result<Proof, String> {
        match &self.users {
            Users::Jwt(jwt) => jwt.check(token).map_err(|(_, text)| text),
            Users::Insecure => match token.strip_prefix("insecure:").filter(|user| im_proto::ids::is_name(user)) {
                Some(user) => Ok(Proof { user: user.to_owned(), expires_unix_s: None }),
                None => {
                    Err("auth is insecure here: use `Bearer insecure:USER` or `Bearer insecure-service`".to_owned())
                }
            },
        }
    }

    /// Whether a bearer token is a server's. Compared in a time that depends on lengths only.
    pub fn is_service(&self, token: &str) -> bool {
        let same = |other: &str| {
            token.len() == other.len()
                && token.bytes().zip(other.bytes()).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
        };
        self.services.as_ref().is_some_and(|services| services.get().iter().any(|service| same(service)))
            || matches!(self.users, Users::Insecure) && token == "insecure-service"
    }
}

impl Jwt {
    fn check(&self, token: &str) -> Result<Proof, (Reason, String)> {
        let bad = |text: &str| (Reason::BadCredentials, text.to_owned());
        let header = decode_header(token).map_err(|_| bad("the token is no JSON Web Token"))?;
        let mut problem =
            bad("no key here matches the token's alg and kid: use HS256, RS256, ES256 or EdDSA with a configured key");
        for key in self.keys.get().iter() {
            let same_id = match (&key.id, &header.kid) {
                (Some(have), Some(want)) => have == want,
                _ => true,
            };
            if key.algorithm != header.alg || !same_id {
                continue;
            }
            let mut validation = Validation::new(key.algorithm);
            validation.leeway = 0;
            // RFC 7519, 4.1.4: not to be accepted "on or after" exp; the library alone refuses only after it.
            validation.reject_tokens_expiring_in_less_than = 1;
            validation.validate_nbf = true;
            validation.set_required_spec_claims(&["exp", "sub"]);
            match &self.audience {
                Some(audience) => {
                    validation.set_audience(&[audience]);
                    validation.required_spec_claims.insert("aud".to_owned());
                }
                None => validation.validate_aud = false,
            }
            if let Some(issuer) = &self.issuer {
                validation.set_issuer(&[issuer]);
                validation.required_spec_claims.insert("iss".to_owned());
            }
            match decode::<Claims>(token, &key.key, &validation) {
                Ok(token) => {
                    return Ok(Proof {
                        user: token.claims.sub,
                        expires_unix_s: Some(token.claims.exp.max(0.0) as u64),
                    });
                }
                Err(error) => {
                    use jsonwebtoken::errors::ErrorKind;
                    problem = match error.kind() {
                        ErrorKind::ExpiredSignature => {
                            (Reason::NotAuthorized, "the token expired: get a new one".to_owned())
                        }
                        ErrorKind::ImmatureSignature => {
                            (Reason::NotAuthorized, "the token is not valid yet".to_owned())
                        }
                        _ => bad("the token's signature or claims (exp, sub, aud, iss) are not right"),
                    };
                }
            }
        }
        Err(problem)
    }
}

fn read(path: &Path) -> Result<String, AuthError> {
    std::fs::read_to_string(path).map_err(|error| AuthError::Read { path: path.to_owned(), error })
}

/// One token per line; empty lines and those that begin with `#` are none.
fn read_service_tokens(path: &Path) -> Result<Vec<String>, AuthError> {
    let text = read(path)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(str::to_owned).collect())
}

fn read_keys(path: &Path, is_key_set: bool) -> Result<Vec<Key>, AuthError> {
    let text = read(path)?;
    let keys = if is_key_set {
        let set: JwkSet = serde_json::from_str(&text).map_err(|error| AuthError::Keys {
            path: path.to_owned(),
            what: format!("no JSON Web Key Set: {error}"),
        })?;
        set.keys.iter().filter_map(key_of_jwk).collect()
    } else if text.contains("-----BEGIN") {
        let blocks = text.split("-----BEGIN").skip(1).map(|block| format!("-----BEGIN{block}"));
        blocks.filter_map(|block| key_of_pem(block.trim().as_bytes())).collect()
    } else {
        let key = DecodingKey::from_secret(text.trim().as_bytes());
        if text.trim().is_empty() { Vec::new() } else { vec![Key { id: None, algorithm: Algorithm::HS256, key }] }
    };
    if keys.is_empty() {
        let what =
            "expected public keys (RSA, P-256 or Ed25519) in PEM, a secret for HS256, or a JSON Web Key Set".to_owned();
        return Err(AuthError::Keys { path: path.to_owned(), what });
    }
    Ok(keys)
}

fn key_of_jwk(jwk: &jsonwebtoken::jwk::Jwk) -> Option<Key> {
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::OctetKey(_) => Algorithm::HS256,
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(_) => Algorithm::EdDSA,
        _ => return None,
    };
    Some(Key { id: jwk.common.key_id.clone(), algorithm, key: DecodingKey::from_jwk(jwk).ok()? })
}

fn key_of_pem(pem: &[u8]) -> Option<Key> {
    let key = |algorithm, key| Some(Key { id: None, algorithm, key });
    if let Ok(rsa) = DecodingKey::from_rsa_pem(pem) {
        return key(Algorithm::RS256, rsa);
    }
    if let Ok(ec) = DecodingKey::from_ec_pem(pem) {
        return key(Algorithm::ES256, ec);
    }
    DecodingKey::from_ed_pem(pem).ok().and_then(|ed| key(Algorithm::EdDSA, ed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    const SECRET: &str = "a secret of some length for the test";

    fn now_s() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
    }

    fn token(algorithm: Algorithm, secret: &str, claims: &serde_json::Value) -> String {
        encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret.as_bytes())).expect("a token")
    }

    fn file(name: &str, content: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("im-auth-{}-{name}", std::process::id()));
        std::fs::write(&path, content).expect("a writable temporary folder");
        path
    }

    fn jwt(keys: Option<&Path>, jwks: Option<&Path>) -> Auth {
        let own = |path: &Path| path.to_owned();
        let config = AuthConfig::Jwt {
            keys_file: keys.map(own),
            jwks_file: jwks.map(own),
            audience: Some("im".to_owned()),
            issuer: Some("idp".to_owned()),
        };
        Auth::new(&config, None).expect("usable keys")
    }

    #[test]
    fn tokens_are_taken_and_refused_by_the_book() {
        let path = file("secret", SECRET);
        let auth = jwt(Some(&path), None);
        let now = now_s();
        let good = json!({ "sub": "alice", "exp": now + 60, "aud": "im", "iss": "idp" });
        let with = |name: &str, value: serde_json::Value| {
            let mut claims = good.clone();
            claims[name] = value;
            token(Algorithm::HS256, SECRET, &claims)
        };
        let ok = auth
            .connect("alice", Some(token(Algorithm::HS256, SECRET, &good).as_bytes()), 5_000)
            .expect("a good token");
        assert!((64_000..=65_000).contains(&ok.expires_at_ms.expect("it ends")), "{ok:?}");
        let cases = [
            ("expired", with("exp", json!(now - 1)), Reason::NotAuthorized),
            ("not yet valid", with("nbf", json!(now + 60)), Reason::NotAuthorized),
            ("another audience", with("aud", json!("web")), Reason::BadCredentials),
            ("another issuer", with("iss", json!("me")), Reason::BadCredentials),
            ("another user", with("sub", json!("bob")), Reason::BadCredentials),
            (
                "no end",
                token(Algorithm::HS256, SECRET, &json!({ "sub": "alice", "aud": "im", "iss": "idp" })),
                Reason::BadCredentials,
            ),
            ("another secret", token(Algorithm::HS256, "guess", &good), Reason::BadCredentials),
            ("another algorithm", token(Algorithm::HS512, SECRET, &good), Reason::BadCredentials),
            ("no token", "password".to_owned(), Reason::BadCredentials),
        ];
        for (what, token, reason) in cases {
            let refused = auth.connect("alice", Some(token.as_bytes()), 0).expect_err(what);
            assert_eq!(refused.reason, reason, "{what}: {refused}");
        }
        assert!(auth.connect("alice", None, 0).is_err());
        std::fs::remove_file(path).expect("it was there");
    }

    /// Keys of this test alone (`openssl genrsa`, `openssl genpkey -algorithm ed25519`).
    const RSA: (&str, &str) = (include_str!("../tests/keys/rsa.pem"), include_str!("../tests/keys/rsa.pub.pem"));
    const ED25519: (&str, &str) =
        (include_str!("../tests/keys/ed25519.pem"), include_str!("../tests/keys/ed25519.pub.pem"));

    #[test]
    fn public_keys_prove_rs256_and_eddsa_from_pem_and_from_a_key_set() {
        let rsa = EncodingKey::from_rsa_pem(RSA.0.as_bytes()).expect("an RSA key");
        let ed25519 = EncodingKey::from_ed_pem(ED25519.0.as_bytes()).expect("an Ed25519 key");
        let ec = rcgen::KeyPair::generate().expect("a P-256 key");
        let es256 = EncodingKey::from_ec_pem(ec.serialize_pem().as_bytes()).expect("a P-256 key");
        let signers = [(Algorithm::RS256, &rsa), (Algorithm::EdDSA, &ed25519), (Algorithm::ES256, &es256)];
        let claims = json!({ "sub": "alice", "exp": now_s() + 60, "aud": "im", "iss": "idp" });
        let sign = |algorithm, id: Option<&str>, key: &EncodingKey| {
            let header = Header { kid: id.map(str::to_owned), ..Header::new(algorithm) };
            encode(&header, &claims, key).expect("a token")
        };

        let path = file("public", &format!("{}{}{}", RSA.1, ED25519.1, ec.public_key_pem()));
        let pem = jwt(Some(&path), None);
        let jwk = |(algorithm, key): &(Algorithm, &EncodingKey)| {
            let mut jwk = jsonwebtoken::jwk::Jwk::from_encoding_key(key, *algorithm).expect("a public key");
            jwk.common.key_id = Some(format!("{algorithm:?}"));
            jwk
        };
        let set = JwkSet { keys: signers.iter().map(jwk).collect() };
        let set_path = file("public-set", &serde_json::to_string(&set).expect("JSON"));
        let key_set = jwt(None, Some(&set_path));
        for (algorithm, key) in signers {
            let plain = sign(algorithm, None, key);
            for (what, auth) in [("PEM", &pem), ("key set", &key_set)] {
                assert!(auth.connect("alice", Some(plain.as_bytes()), 0).is_ok(), "{algorithm:?} by {what}");
                let (signed, signature) = plain.rsplit_once('.').expect("three parts");
                let flipped = if signature.starts_with('A') { "B" } else { "A" };
                let forged = format!("{signed}.{flipped}{}", &signature[1..]);
                let refused = auth.connect("alice", Some(forged.as_bytes()), 0).expect_err("a forged signature");
                assert_eq!(refused.reason, Reason::BadCredentials, "{algorithm:?} by {what}");
            }
            let named = sign(algorithm, Some(&format!("{algorithm:?}")), key);
            assert!(key_set.connect("alice", Some(named.as_bytes()), 0).is_ok(), "{algorithm:?} by its kid");
            let misnamed = sign(algorithm, Some("another"), key);
            assert!(key_set.connect("alice", Some(misnamed.as_bytes()), 0).is_err(), "{algorithm:?} by another kid");
        }
        // A public key is no secret: used as one for HS256 it proves nothing.
        let confused = token(Algorithm::HS256, RSA.1.trim(), &claims);
        assert!(pem.connect("alice", Some(confused.as_bytes()), 0).is_err());
        for path in [path, set_path] {
            std::fs::remove_file(path).expect("it was there");
        }
    }

    #[test]
    fn a_changed_key_set_is_read_again_and_a_broken_one_is_not() {
        let set = |secret: &str| {
            let encoded = {
                use base64::Engine;
                base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(secret)
            };
            json!({ "keys": [{ "kty": "oct", "kid": "k", "alg": "HS256", "k": encoded }] }).to_string()
        };
        let path = file("set", &set("the first secret"));
        let auth = jwt(None, Some(&path));
        let claims = json!({ "sub": "alice", "exp": now_s() + 60, "aud": "im", "iss": "idp" });
        let second = token(Algorithm::HS256, "the second secret", &claims);
        assert!(auth.connect("alice", Some(second.as_bytes()), 0).is_err());
        let Users::Jwt(jwt) = &auth.users else { unreachable!("made with keys") };
        std::fs::write(&path, set("the second secret")).expect("writable");
        jwt.keys.look_again();
        assert!(auth.connect("alice", Some(second.as_bytes()), 0).is_ok());
        std::fs::write(&path, "{").expect("writable");
        jwt.keys.look_again();
        assert!(auth.connect("alice", Some(second.as_bytes()), 0).is_ok(), "the last good keys stay");
        std::fs::remove_file(path).expect("it was there");
    }

    #[test]
    fn service_tokens_are_lines_of_a_file() {
        let path = file("services", "# servers\n\none\n two \n");
        let auth = Auth::new(&AuthConfig::Insecure {}, Some(&path)).expect("readable");
        for (token, is) in [
            ("one", true),
            ("two", true),
            ("insecure-service", true),
            ("# servers", false),
            ("", false),
            ("onE", false),
        ] {
            assert_eq!(auth.is_service(token), is, "{token:?}");
        }
        assert_eq!(auth.bearer_user("insecure:bob").map(|proof| proof.user), Ok("bob".to_owned()));
        assert!(auth.bearer_user("insecure:b b").is_err());
        std::fs::remove_file(path).expect("it was there");
    }
}
