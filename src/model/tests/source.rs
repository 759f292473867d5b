//! `--model` by path and by name, with a hub of our own.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::*;

/// Answers as the hub does: a listing, and files by range.
struct Hub {
    endpoint: String,
    requests: Arc<AtomicUsize>,
    tokens: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn serve(files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (requests, tokens) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (count, seen) = (requests.clone(), tokens.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::Relaxed);
                answer(stream.unwrap(), &files, &seen);
            }
        });
        Self { endpoint, requests, tokens }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

fn answer(mut stream: TcpStream, files: &HashMap<String, Vec<u8>>, tokens: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let request = lines.next().unwrap();
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        headers.iter().find_map(|line| line.to_lowercase().strip_prefix(name).map(|rest| rest.trim().to_owned()))
    };
    tokens.lock().unwrap().extend(header("authorization:"));
    let respond = |stream: &mut TcpStream, status: &str, extra: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
    };
    if path == "/api/models/org/tiny/revision/main" {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": "c0ffee", "siblings": siblings}).to_string();
        return respond(&mut stream, "200 OK", "Content-Type: application/json\r\n", body.as_bytes());
    }
    let file = path.strip_prefix("/org/tiny/resolve/main/").and_then(|name| Some((name, files.get(name)?)));
    let Some((name, bytes)) = file else {
        return respond(&mut stream, "404 Not Found", "", b"");
    };
    let range = header("range:").unwrap();
    let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(bytes.len(), |to: usize| to + 1).min(bytes.len());
    let facts = format!(
        "ETag: \"{}\"\r\nX-Repo-Commit: c0ffee\r\nContent-Range: bytes {from}-{}/{}\r\n",
        name.replace('.', "-"),
        to - 1,
        bytes.len()
    );
    respond(&mut stream, "206 Partial Content", &facts, &bytes[from..to]);
}

fn files_of(case: &str) -> HashMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(fixtures().join(case).join("model")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())).collect()
}

fn sources(temp: &Path, endpoint: &str) -> Sources {
    Sources {
        cache: temp.join("mote"),
        hub_cache: temp.join("hub"),
        hub_endpoint: Some(endpoint.to_owned()),
        hub_token: Some("hf_secret".into()),
    }
}

#[test]
fn paths_are_taken_as_they_are() {
    let temp = tempfile::tempdir().unwrap();
    let sources = sources(temp.path(), "http://127.0.0.1:9");
    let folder = fixtures().join("golden/llama/model");
    let resolved = sources.resolve(folder.to_str().unwrap()).unwrap();
    assert_eq!(resolved, ResolvedModel { path: folder, name: "model".into() });
    let file = temp.path().join("Some.Q4_1.gguf");
    std::fs::write(&file, "").unwrap();
    assert_eq!(sources.resolve(file.to_str().unwrap()).unwrap().name, "Some.Q4_1");
    for wrong in [
        "/nonexistent/x.gguf",
        "./folder",
        "name",
        "a/b/c",
        "org/file.gguf",
        "../x:y.gguf",
        "org/repo:../x.gguf",
        "org/repo:x.bin",
        "",
    ] {
        let error = sources.resolve(wrong).unwrap_err().to_string();
        assert!(error.contains("no such file"), "{wrong}: {error}");
    }
}

#[test]
fn a_repository_is_fetched_once() {
    for case in ["golden/llama", "golden2/qwen2odd"] {
        let hub = Hub::serve(files_of(case));
        let temp = tempfile::tempdir().unwrap();
        let sources = sources(temp.path(), &hub.endpoint);
        let resolved = sources.resolve("org/tiny").unwrap();
        assert_eq!(resolved.name, "tiny");
        let model = load(&resolved.path).unwrap();
        assert_eq!(model.spec, golden::model_of(case).spec);
        assert!(resolved.path.join("generation_config.json").exists());
        let requests = hub.requests();
        assert!(requests > 8);
        assert!(hub.tokens.lock().unwrap().iter().all(|token| token == "bearer hf_secret"));
        assert_eq!(sources.resolve("org/tiny").unwrap(), resolved);
        assert_eq!(hub.requests(), requests, "a complete cache needs no network");
        // An interrupted download is taken up again.
        let weights = std::fs::read_dir(&resolved.path).unwrap().map(|entry| entry.unwrap().path());
        let weights = weights.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        std::fs::remove_file(weights.max().unwrap()).unwrap();
        assert!(load(&sources.resolve("org/tiny").unwrap().path).is_ok());
        assert!(hub.requests() > requests);
    }
}

#[test]
fn one_file_of_a_repository() {
    let hub = Hub::serve(HashMap::from([("Tiny.Q8_0.gguf".to_owned(), b"GGUF".to_vec())]));
    let temp = tempfile::tempdir().unwrap();
    let sources = sources(temp.path(), &hub.endpoint);
    let resolved = sources.resolve("org/tiny:Tiny.Q8_0.gguf").unwrap();
    assert_eq!(resolved.name, "Tiny.Q8_0");
    assert_eq!(std::fs::read(resolved.path).unwrap(), b"GGUF");
    let whole = sources.resolve("org/tiny").unwrap_err().to_string();
    assert!(whole.contains("no config.json") && whole.contains("org/tiny:FILE.gguf"), "{whole}");
}

#[test]
fn failures_of_the_hub_say_what_to_do() {
    let hub = Hub::serve(HashMap::new());
    let temp = tempfile::tempdir().unwrap();
    let missing = sources(temp.path(), &hub.endpoint).resolve("org/other").unwrap_err().to_string();
    assert!(missing.contains("no such repository") && missing.contains("HF_TOKEN"), "{missing}");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // closed again
    let away = sources(temp.path(), &format!("http://127.0.0.1:{port}")).resolve("org/tiny").unwrap_err().to_string();
    assert!(away.contains("check the network") && away.contains("org/tiny"), "{away}");
    assert!(!away.contains("hf_secret"));
}
