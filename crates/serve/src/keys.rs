//! API keys.

use axum::http::{HeaderMap, header};

use crate::error::ApiError;

/// The keys that are accepted; with none, everybody is.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<String>);

impl Keys {
    /// Takes keys; empty ones are no keys.
    pub fn new(keys: &[String]) -> Self {
        Self(keys.iter().filter(|key| !key.is_empty()).cloned().collect())
    }

    /// Whether a key is asked for at all.
    pub fn are_wanted(&self) -> bool {
        !self.0.is_empty()
    }

    /// The place of the request's key among the keys; 0 where none is asked for.
    ///
    /// # Errors
    /// 401: no key, or one that is not among them.
    pub fn check(&self, headers: &HeaderMap) -> Result<usize, ApiError> {
        if self.0.is_empty() {
            return Ok(0);
        }
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let bearer = bearer.and_then(|value| value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")));
        // The second is how Anthropic's clients send it.
        let given = bearer.or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok()));
        let Some(given) = given.map(str::trim).filter(|given| !given.is_empty()) else {
            return Err(ApiError::unauthorized(
                "You didn't provide an API key: send it in the header `Authorization: Bearer KEY`.",
            ));
        };
        // All are compared, each in the same time whatever it shares with the one given.
        let mut found = None;
        for (place, key) in self.0.iter().enumerate() {
            if same(key.as_bytes(), given.as_bytes()) {
                found = Some(place);
            }
        }
        found.ok_or_else(|| ApiError::unauthorized("Incorrect API key provided."))
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |differences, (a, b)| differences | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_in_both_headers() {
        let keys = Keys::new(&["first".into(), String::new(), "second".into()]);
        let check = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            keys.check(&headers).ok()
        };
        assert_eq!(check("authorization", "Bearer first"), Some(0));
        assert_eq!(check("authorization", "Bearer second"), Some(1));
        assert_eq!(check("x-api-key", "second"), Some(1));
        for wrong in ["Bearer secon", "Bearer secondd", "Bearer ", "second", "Basic first"] {
            assert_eq!(check("authorization", wrong), None, "{wrong}");
        }
        assert!(keys.check(&HeaderMap::new()).is_err());
        assert!(Keys::default().check(&HeaderMap::new()).is_ok());
        assert!(!Keys::new(&[String::new()]).are_wanted());
    }
}
