//! Remote graders against servers on loopback, over plain HTTP: the rules are weaker here, and tested by themselves.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::atomic::AtomicUsize,
    time::Instant,
};

use super::*;

/// A server that answers each request with what `answer` makes of its body and its number.
fn serve(answer: impl Fn(&str, usize) -> String + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://127.0.0.1:{}/grade", listener.local_addr().unwrap().port());
    let count = Arc::new(AtomicUsize::new(0));
    let (seen, answer) = (count.clone(), Arc::new(answer));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (seen, answer) = (seen.clone(), answer.clone());
            thread::spawn(move || while one(stream.as_ref().unwrap(), &seen, &*answer).is_some() {});
        }
    });
    (url, count)
}

fn one(stream: &TcpStream, seen: &AtomicUsize, answer: &dyn Fn(&str, usize) -> String) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(digits) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = digits.trim().parse().ok()?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let text = answer(&String::from_utf8(body).ok()?, seen.fetch_add(1, Ordering::SeqCst));
    (&*stream).write_all(text.as_bytes()).ok()
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn spec(url: &str, timeout_ms: u64, retries: u32) -> RemoteSpec {
    RemoteSpec { url: url.to_owned(), timeout_ms, retries }
}

/// What calls on loopback need; nothing else is weaker.
fn open(url: &str) -> RemoteAccess {
    let host = url.trim_start_matches("http://").split('/').next().unwrap().to_owned();
    RemoteAccess { rules: Rules { allows: |_| true, https_only: false }, ..RemoteAccess::new(vec![host], 4) }
}

fn grader(url: &str, timeout_ms: u64, retries: u32) -> Box<dyn Grader> {
    open(url).connect(&spec(url, timeout_ms, retries)).unwrap_or_else(|error| panic!("{error}"))
}

fn failure(grader: &dyn Grader) -> String {
    match grader.grade(GradeCall { item: &json!({}), output_text: "x" }) {
        Err(GraderError::Failed(words)) => words,
        other => panic!("{other:?}"),
    }
}

#[test]
fn completions_are_graded_in_their_order_over_many_connections() {
    let (url, count) = serve(|body, _| {
        let body: Value = serde_json::from_str(body).unwrap();
        let digits: f64 = body["sample"]["output_text"].as_str().unwrap().parse().unwrap();
        thread::sleep(Duration::from_millis((40.0 - digits) as u64));
        ok(&format!("{{\"score\": {}}}", digits + body["item"]["plus"].as_f64().unwrap()))
    });
    let item = json!({"plus": 0.5});
    let texts: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    let calls: Vec<GradeCall<'_>> = texts.iter().map(|text| GradeCall { item: &item, output_text: text }).collect();
    let grades = grader(&url, 5000, 0).grade_batch(&calls, &Stop::default()).unwrap();
    let rewards: Vec<f32> = grades.into_iter().map(|grade| grade.reward).collect();
    assert_eq!(rewards, (0..40).map(|number| number as f32 + 0.5).collect::<Vec<_>>());
    assert_eq!(count.load(Ordering::SeqCst), 40);
}

#[test]
fn a_grader_that_hangs_fails_in_time_and_can_be_stopped() {
    let (url, count) = serve(|_, _| {
        thread::sleep(Duration::from_secs(60));
        String::new()
    });
    let began = Instant::now();
    let words = failure(&*grader(&url, 200, 1));
    assert_eq!(words, "the remote grader did not answer within 200 ms (2 tries)");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(count.load(Ordering::SeqCst), 2);

    let (stop, slow) = (Stop::default(), grader(&url, 60_000, 0));
    let later = stop.clone();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        later.stop();
    });
    let began = Instant::now();
    let item = json!({});
    let outcome = slow.grade_batch(&[GradeCall { item: &item, output_text: "x" }], &stop);
    assert_eq!(outcome, Err((0, GraderError::Stopped)));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn redirects_are_not_followed() {
    let (inner, reached) = serve(|_, _| ok("{\"score\": 1}"));
    let (url, count) =
        serve(move |_, _| format!("HTTP/1.1 302 Found\r\nlocation: {inner}\r\ncontent-length: 0\r\n\r\n"));
    let words = failure(&*grader(&url, 5000, 3));
    assert_eq!(words, "the remote grader answered with a redirect (302 Found), which is not followed");
    assert_eq!((count.load(Ordering::SeqCst), reached.load(Ordering::SeqCst)), (1, 0), "and not tried again");
}

#[test]
fn what_is_no_score_is_an_error_and_never_a_reward() {
    for (answer, want) in [
        (ok("{\"points\": 1}"), "the remote grader's answer is not {\"score\": a number}"),
        (ok("[]"), "the remote grader's answer is not {\"score\": a number}"),
        (ok("{\"score\": 1e300}"), "the remote grader's score is not finite"),
        (
            ok(&format!("{{\"score\": 1, \"rest\": \"{}\"}}", "x".repeat(80_000))),
            "the remote grader's answer is longer than 65536 bytes",
        ),
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned(), "the remote grader answered 404 Not Found"),
    ] {
        let (url, count) = serve(move |_, _| answer.clone());
        assert_eq!(failure(&*grader(&url, 5000, 2)), want);
        assert_eq!(count.load(Ordering::SeqCst), 1, "{want}: it will not go better the next time");
    }
}

#[test]
fn an_overloaded_grader_is_asked_again() {
    let busy = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
    let (url, count) = serve(move |_, number| if number < 2 { busy.to_owned() } else { ok("{\"reward\": 0.25}") });
    let call = GradeCall { item: &json!({}), output_text: "x" };
    assert_eq!(grader(&url, 5000, 2).grade(call).unwrap().reward, 0.25);
    assert_eq!(count.load(Ordering::SeqCst), 3);
    let (url, _) = serve(move |_, _| busy.to_owned());
    assert_eq!(failure(&*grader(&url, 5000, 1)), "the remote grader answered 503 Service Unavailable (2 tries)");
}

#[test]
fn only_listed_hosts_and_public_addresses_are_taken() {
    let access = |hosts: &[&str]| RemoteAccess::new(hosts.iter().map(|host| (*host).to_owned()).collect(), 1);
    let refused = |access: &RemoteAccess, url: &str| match access.connect(&spec(url, 1000, 0)) {
        Ok(_) => "taken".to_owned(),
        Err(words) => words,
    };
    assert!(refused(&access(&[]), "https://grader.example.org/x").contains("calls no remote graders"));
    let some =
        access(&["grader.example.org", "*.lab.example", "other.example:8443", "127.0.0.1", "localhost", "[::1]"]);
    for url in [
        "https://grader.example.org/grade",
        "https://GRADER.example.org:443/",
        "https://a.lab.example/x",
        "https://a.b.lab.example/x",
        "https://other.example:8443/x",
    ] {
        assert_eq!(refused(&some, url), "taken", "{url}");
    }
    for (url, want) in [
        ("http://grader.example.org/", "must begin with https://"),
        ("https://grader.example.org:8443/", "not among the hosts"),
        ("https://other.example/", "not among the hosts"),
        ("https://lab.example/", "not among the hosts"),
        ("https://evil.example/", "not among the hosts"),
        ("https://xlab.example/", "not among the hosts"),
        ("https://grader.example.org.evil.example/", "not among the hosts"),
        ("https://grader.example.org@evil.example/", "user name"),
        ("https://127.0.0.1/", "is not a public address"),
        ("https://[::1]/", "is not a public address"),
        ("https://[::ffff:10.0.0.1]/", "is not a public address"),
        ("https://169.254.169.254/latest", "is not a public address"),
        ("https:///x", "url"),
    ] {
        let words = refused(&some, url);
        assert!(words.contains(want), "{url}: {words}");
    }
}

#[test]
fn a_listed_name_that_points_inside_is_not_called() {
    let (url, count) = serve(|_, _| ok("{\"score\": 1}"));
    let port = url.rsplit_once(':').unwrap().1.split('/').next().unwrap().to_owned();
    // Every rule but https: the name is on the list, its address is checked when it is known.
    for host in ["localhost", "2130706433", "0x7f000001", "127.1"] {
        let mut access = RemoteAccess::new(vec![format!("{host}:{port}")], 1);
        access.rules.https_only = false;
        let made = access.connect(&spec(&format!("http://{host}:{port}/"), 2000, 2));
        let words = made.map_or_else(|words| words, |grader| failure(&*grader));
        assert!(words.contains("not a public address") || words.contains("not found"), "{host}: {words}");
    }
    assert_eq!(count.load(Ordering::SeqCst), 0, "nothing was connected to");
}
