//! An acknowledged write survives kill -9: a child process uploads and prints what was acknowledged, until it is killed.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    time::Duration,
};

use super::*;

const LOCATION: &str = "MOTE_TEST_CHILD_LOCATION";
const ROUND: &str = "MOTE_TEST_CHILD_ROUND";

fn location(text: &str) -> Location {
    if text.starts_with("postgres") { Location::Postgres(text.into()) } else { Location::Directory(text.into()) }
}

/// Not a test: the process to be killed. Eight writers of single uploads, and one of batches.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of the test below"]
async fn child_that_uploads_until_killed() {
    let (Ok(place), Ok(round)) = (std::env::var(LOCATION), std::env::var(ROUND)) else { return };
    let store = Store::open(StoreConfig::new(location(&place))).await.unwrap();
    let acknowledge = |record: &AdapterRecord| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "ack {} {}", record.name, record.contents.generation).unwrap();
        out.flush().unwrap();
    };
    let writers: Vec<_> = (0..9u64)
        .map(|writer| {
            let (store, round) = (store.clone(), round.clone());
            tokio::spawn(async move {
                for turn in 0.. {
                    let item = |i: u64| {
                        let name = format!("r{round}-w{writer}-{turn}-{i}");
                        new(BUILT_IN_TENANT, &name, turn << 20 | writer << 12 | i)
                    };
                    let count = if writer == 8 { 300 } else { 1 };
                    for result in store.put_adapters((0..count).map(item).collect()).await.unwrap() {
                        acknowledge(&written(result));
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

#[tokio::test]
async fn acknowledged_uploads_survive_kill_9() {
    for database in Database::each().await {
        let place = match &database.config.location {
            Location::Directory(path) => path.to_str().unwrap().to_owned(),
            Location::Postgres(url) => url.clone(),
        };
        let mut acknowledged: HashMap<String, String> = HashMap::new();
        for round in 0..6u64 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::tests::durability::child_that_uploads_until_killed"])
                .args(["--ignored", "--nocapture"])
                .env(LOCATION, &place)
                .env(ROUND, round.to_string())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let stdout = child.stdout.take().unwrap();
            let reader = std::thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(std::result::Result::ok);
                // A line cut by the kill does not count: it has no 32 digits at its end.
                let acks = lines.filter_map(|line| {
                    let (name, generation) = line.strip_prefix("ack ")?.split_once(' ')?;
                    (generation.len() == 32).then(|| (name.to_owned(), generation.to_owned()))
                });
                acks.collect::<Vec<_>>()
            });
            // Somewhere in the middle, differently each time.
            let bits = uuid::Uuid::now_v7().as_u128() as u64;
            tokio::time::sleep(Duration::from_millis(400 + bits % 400)).await;
            child.kill().unwrap();
            child.wait().unwrap();
            let acks = reader.join().unwrap();
            println!("round {round}: {} acknowledged", acks.len());
            acknowledged.extend(acks);

            let store = database.open().await;
            let found = all(&store).await;
            for (name, generation) in &acknowledged {
                let adapter = found.get(&(BUILT_IN_TENANT, name.clone()));
                let adapter = adapter.unwrap_or_else(|| panic!("{name} was acknowledged and is gone"));
                assert_eq!(adapter.contents.generation.to_string(), *generation);
                assert_eq!(adapter.contents.data.len(), 26);
            }
            store.close().await;
        }
        assert!(acknowledged.len() > 500, "only {} were acknowledged: too few to mean much", acknowledged.len());
    }
}
