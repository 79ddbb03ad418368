//! Waits for one future until another ends.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;

/// What `wanted` gives; none if `end` comes first.
pub async fn race<T>(
    mut end: Pin<&mut impl Future<Output = ()>>,
    wanted: impl Future<Output = T>,
) -> Option<T> {
    let mut wanted = pin!(wanted);
    poll_fn(|context| {
        use Poll::{Pending, Ready};
        match end.as_mut().poll(context) {
            Ready(()) => Ready(None),
            Pending => wanted.as_mut().poll(context).map(Some),
        }
    })
    .await
}
