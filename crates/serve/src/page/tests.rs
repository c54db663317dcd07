//! What the browser test cannot see: that nothing points away from the server, and that every file is served.

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use tower::ServiceExt;

use super::*;

async fn fetch(path: &str) -> (StatusCode, axum::http::HeaderMap, String) {
    let request = Request::get(path).body(Body::empty()).unwrap();
    let answer = routes::<()>().oneshot(request).await.unwrap();
    let (parts, body) = answer.into_parts();
    let text = String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap();
    (parts.status, parts.headers, text)
}

/// The text without comments, which may name a standard or a source.
fn without_comments(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("/*") {
        out.push_str(&rest[..at]);
        rest = rest[at..].split_once("*/").map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    let is_comment = |line: &&str| line.trim_start().starts_with("//");
    out.lines().filter(|line| !is_comment(line)).collect::<Vec<_>>().join("\n")
}

/// Addresses of other hosts in a text.
fn foreign(text: &str) -> Vec<&str> {
    let found = text.match_indices("//").map(|(at, _)| &text[at.saturating_sub(6)..text.len().min(at + 40)]);
    found.filter(|around| around.contains("http") || around.contains("\"//") || around.contains("ws")).collect()
}

#[test]
fn nothing_points_to_another_host() {
    for asset in ASSETS {
        let text = without_comments(asset.text);
        // Names that say what a vocabulary is, not where to fetch it; and the pattern for addresses that a model writes.
        let known = ["http://www.w3.org/2000/svg", r"https?:\/\/"];
        let text = known.iter().fold(text, |text, name| text.replace(name, ""));
        assert_eq!(foreign(&text), [""; 0], "{}", asset.name);
    }
    assert_eq!(foreign(r#"<script src="https://example.org/a.js">"#).len(), 1);
    assert_eq!(foreign(r#"<script src="//example.org/a.js">"#).len(), 1);
}

#[test]
fn scripts_never_make_html_from_text() {
    let ways = [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
        "DOMParser",
    ];
    for asset in ASSETS {
        let found = ways.iter().filter(|way| asset.text.contains(**way)).collect::<Vec<_>>();
        assert!(found.is_empty(), "{}: {found:?}", asset.name);
    }
    let document = ASSETS[0].text;
    assert!(!document.contains("style=") && !document.contains(" onclick") && !document.contains("<style"));
}

#[test]
fn every_import_and_reference_is_an_asset() {
    let names = ASSETS.iter().map(|asset| asset.name).collect::<Vec<_>>();
    let mut seen = 0;
    for asset in ASSETS {
        for opening in ["from \"./", "\"/assets/"] {
            for rest in asset.text.split(opening).skip(1) {
                let name = rest.split('"').next().unwrap();
                assert!(names.contains(&name), "{} refers to {name}", asset.name);
                seen += 1;
            }
        }
    }
    assert!(seen > names.len());
}

#[tokio::test]
async fn every_file_is_served_with_the_policy() {
    let (status, headers, text) = fetch("/").await;
    assert_eq!((status, &text[..]), (StatusCode::OK, ASSETS[0].text));
    assert_eq!(headers[header::CONTENT_SECURITY_POLICY], CONTENT_SECURITY_POLICY);
    for asset in &ASSETS[1..] {
        let (status, headers, text) = fetch(&format!("/assets/{}", asset.name)).await;
        assert_eq!((status, &text[..]), (StatusCode::OK, asset.text), "{}", asset.name);
        assert_eq!(headers[header::CONTENT_TYPE], asset.content_type);
        assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(headers[header::CONTENT_SECURITY_POLICY], CONTENT_SECURITY_POLICY);
    }
}

#[tokio::test]
async fn other_names_are_not_found() {
    for path in ["/assets/mod.rs", "/assets/../mod.rs", "/assets/%2e%2e%2fmod.rs", "/assets/", "/assets/index.html"] {
        assert_eq!(fetch(path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    let (_, _, text) = fetch("/assets/mod.rs").await;
    let error: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("/assets/mod.rs"));
}
