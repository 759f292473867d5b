//! Rates, printed: `cargo nextest run --lib --release --run-ignored only --no-capture store::tests::measure`.

use std::time::Instant;

use super::*;

const ROWS: u64 = 100_000;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn rates() {
    for database in Database::each().await {
        let store = database.open().await;
        println!(
            "-- {}",
            if matches!(database.config.location, Location::Directory(_)) { "SQLite" } else { "PostgreSQL" }
        );

        let started = Instant::now();
        for group in 0..ROWS.div_ceil(1024) {
            let items = (0..1024).map(|i| {
                let number = group * 1024 + i;
                // Names in no order, as users have them.
                new(BUILT_IN_TENANT, &format!("user-{:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15)), number)
            });
            store.put_adapters(items.collect()).await.unwrap().into_iter().for_each(|result| drop(written(result)));
        }
        let seconds = started.elapsed().as_secs_f64();
        println!("batches of 1024: {:.0} rows/s", ROWS as f64 / seconds);

        const SINGLES: u64 = 20_000;
        for connections in [1u64, 16, 64, 256] {
            let started = Instant::now();
            let total = if connections == 1 { SINGLES / 10 } else { SINGLES };
            let tasks: Vec<_> = (0..connections)
                .map(|connection| {
                    let store = store.clone();
                    tokio::spawn(async move {
                        for i in 0..total / connections {
                            let name = format!("s{connections}-{connection}-{i}");
                            written(store.put_adapter(new(BUILT_IN_TENANT, &name, i)).await);
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            let seconds = started.elapsed().as_secs_f64();
            println!("single uploads, {connections} at a time: {:.0}/s", total as f64 / seconds);
        }

        // As at a start: the log of the writes above was folded into the database when it was closed.
        store.close().await;
        let store = database.open().await;
        let started = Instant::now();
        let mut bytes = 0;
        let count = store.load_all(|loaded| bytes += loaded.unwrap().contents.data.len()).await.unwrap();
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "load: {count} adapters in {seconds:.2} s, {:.0} rows/s ({bytes} bytes of numbers)",
            count as f64 / seconds
        );

        let started = Instant::now();
        let page = store.list_adapters(BUILT_IN_TENANT, "user-", Some("user-8"), 100).await.unwrap();
        println!("a page of {}: {:?}", page.len(), started.elapsed());
        store.close().await;
    }
}
