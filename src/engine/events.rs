//! The channel of one request: the engine's thread on one side, a task on the other.
//!
//! Waking a task costs its worker a context switch and, when that worker sleeps, the engine a system call; beside a step that keeps every processor
//! busy that is time taken from the arithmetic. So events only lie in the channel until the engine has dealt with the whole step, then each task that waits is woken
//! once ([`Wakes`]); and who reads nothing before the end ([`Events::hold_until_end`]) is woken once altogether.

use std::{
    fmt,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{self, TryRecvError},
    },
    task::{Context, Poll, Waker},
};

use futures::task::AtomicWaker;

use super::api::Event;

/// What both sides see.
#[derive(Debug, Default)]
struct Shared {
    /// Nobody reads any more.
    gone: AtomicBool,
    /// The last event is in the channel.
    ended: AtomicBool,
    /// The reader wants nothing before that.
    at_end: AtomicBool,
    waker: AtomicWaker,
}

/// Tasks to be woken.
#[derive(Debug, Default)]
pub(super) struct Wakes(Vec<Waker>);

impl Wakes {
    /// Wakes them.
    pub(super) fn deliver(&mut self) {
        self.0.drain(..).for_each(Waker::wake);
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The engine's side.
#[derive(Debug)]
pub(super) struct Sender {
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
}

/// Events of one request. Dropping it cancels the request: its blocks are free at the next step.
pub struct Events {
    events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
}

/// A channel. It is bounded by what a request can produce, so nobody ever waits for room.
pub(super) fn channel() -> (Sender, Events) {
    let (sender, receiver) = mpsc::channel();
    let shared = Arc::new(Shared::default());
    (Sender { events: sender, shared: Arc::clone(&shared) }, Events { events: receiver, shared })
}

impl Sender {
    /// True when nobody listens any more.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.gone.load(SeqCst)
    }

    /// Puts an event in; the reader is added to `wakes` if it waits for this. A reader that has gone is noticed by [`Sender::is_closed`].
    pub(super) fn send(&self, event: Event, wakes: &mut Wakes) {
        let _ = self.events.send(event);
        if !self.shared.at_end.load(SeqCst) {
            wakes.0.extend(self.shared.waker.take());
        }
    }

    /// Puts the last event in.
    pub(super) fn send_last(&self, event: Event, wakes: &mut Wakes) {
        let _ = self.events.send(event);
        self.shared.ended.store(true, SeqCst);
        wakes.0.extend(self.shared.waker.take());
    }
}

impl Events {
    /// From now on nothing comes before the last event is there; then everything does. For readers that can do nothing with a part: they are not woken for it.
    pub fn hold_until_end(&mut self) {
        // The sender may still see the old value and wake once too often.
        self.shared.at_end.store(true, SeqCst);
    }

    /// The next event; None after the last one. Cancel safe.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    /// The same for a thread.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        futures::executor::block_on(self.recv())
    }

    /// An event that is there already.
    pub fn try_recv(&mut self) -> Option<Event> {
        if self.shared.at_end.load(SeqCst) && !self.shared.ended.load(SeqCst) {
            return None;
        }
        self.events.try_recv().ok()
    }

    fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if let Some(event) = self.try_recv() {
            return Poll::Ready(Some(event));
        }
        // First the waker, then another look: whatever comes after that look finds the waker.
        self.shared.waker.register(context.waker());
        if self.shared.at_end.load(SeqCst) && !self.shared.ended.load(SeqCst) {
            return Poll::Pending;
        }
        match self.events.try_recv() {
            Ok(event) => Poll::Ready(Some(event)),
            Err(TryRecvError::Disconnected) => Poll::Ready(None),
            // The last event may have come between the two looks; after it nothing does.
            Err(TryRecvError::Empty) if self.shared.ended.load(SeqCst) => Poll::Ready(self.events.try_recv().ok()),
            Err(TryRecvError::Empty) => Poll::Pending,
        }
    }

    /// Cancels the request. What has come by now can still be read.
    pub fn close(&mut self) {
        self.shared.gone.store(true, SeqCst);
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("shared", &self.shared).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicUsize,
        task::{Wake, Waker},
    };

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    fn event(cached_tokens: usize) -> Event {
        Event::Began { cached_tokens }
    }

    #[test]
    fn a_reader_is_woken_once_a_step_and_only_when_the_step_is_over() {
        let (sender, mut events) = channel();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        let mut wakes = Wakes::default();
        assert!(events.poll_recv(&mut context).is_pending());
        (0..3).for_each(|n| sender.send(event(n), &mut wakes));
        assert_eq!((count.0.load(SeqCst), wakes.len()), (0, 1));
        wakes.deliver();
        assert_eq!(count.0.load(SeqCst), 1);
        for n in 0..3 {
            assert_eq!(events.poll_recv(&mut context), Poll::Ready(Some(event(n))));
        }
        assert!(events.poll_recv(&mut context).is_pending());
        sender.send_last(event(9), &mut wakes);
        wakes.deliver();
        assert_eq!(count.0.load(SeqCst), 2);
        assert_eq!(events.blocking_recv(), Some(event(9)));
        assert_eq!(events.blocking_recv(), None);
    }

    #[test]
    fn who_holds_until_the_end_is_woken_by_the_end_alone() {
        let (sender, mut events) = channel();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        let mut wakes = Wakes::default();
        sender.send(event(0), &mut wakes);
        events.hold_until_end();
        assert!(events.poll_recv(&mut context).is_pending() && events.try_recv().is_none());
        sender.send(event(1), &mut wakes);
        assert_eq!(wakes.len(), 0);
        sender.send_last(event(2), &mut wakes);
        assert_eq!(wakes.len(), 1);
        wakes.deliver();
        assert_eq!(count.0.load(SeqCst), 1);
        for n in 0..3 {
            assert_eq!(events.poll_recv(&mut context), Poll::Ready(Some(event(n))));
        }
        assert_eq!(events.poll_recv(&mut context), Poll::Ready(None));
    }

    #[test]
    fn a_reader_that_leaves_is_noticed_and_a_sender_that_leaves_too() {
        let (sender, events) = channel();
        assert!(!sender.is_closed());
        drop(events);
        assert!(sender.is_closed());
        sender.send(event(0), &mut Wakes::default());
        let (sender, mut events) = channel();
        sender.send(event(0), &mut Wakes::default());
        drop(sender);
        assert_eq!((events.try_recv(), events.blocking_recv()), (Some(event(0)), None));
    }

    #[test]
    fn the_last_event_is_seen_however_close_the_reader_looks() {
        let (to_writer, senders) = mpsc::channel::<Sender>();
        let writer = std::thread::spawn(move || {
            let mut wakes = Wakes::default();
            for sender in senders {
                sender.send_last(event(7), &mut wakes);
                wakes.deliver();
            }
        });
        for round in 0..10_000 {
            let (sender, mut events) = channel();
            let mut context = Context::from_waker(Waker::noop());
            to_writer.send(sender).unwrap();
            // It hardly rests, so that it looks in every moment of the writer's.
            let mut looks = 0;
            let found = loop {
                if let Poll::Ready(found) = events.poll_recv(&mut context) {
                    break found;
                }
                looks += 1;
                if looks % 1000 == 0 {
                    std::thread::yield_now();
                }
            };
            assert_eq!(found, Some(event(7)), "round {round}");
            assert_eq!(events.blocking_recv(), None);
        }
        drop(to_writer);
        writer.join().unwrap();
    }

    #[test]
    fn no_wake_is_lost_between_threads() {
        for hold in [false, true] {
            let (sender, mut events) = channel();
            if hold {
                events.hold_until_end();
            }
            let writer = std::thread::spawn(move || {
                let mut wakes = Wakes::default();
                for n in 0..20_000 {
                    sender.send(event(n), &mut wakes);
                    wakes.deliver();
                }
                sender.send_last(event(20_000), &mut wakes);
                wakes.deliver();
            });
            for n in 0..=20_000 {
                assert_eq!(events.blocking_recv(), Some(event(n)));
            }
            assert_eq!(events.blocking_recv(), None);
            writer.join().unwrap();
        }
    }
}
