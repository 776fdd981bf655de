//! Serving a Varlink interface on a UNIX socket, from a thread of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use tokio::task::LocalSet;
use zlink::tokio::unix::{Connection, Listener, Stream};
use zlink::{Listener as _, Server, Service};

/// Serves on `listener` for as long as the process lives. Each connection has a service of its own: one of them serves its connections
/// by turns, and whoever asks something quick would wait for another client's long request.
pub fn serve<S>(listener: UnixListener, service: impl Fn() -> S + Send + 'static) -> io::Result<()>
where
    S: Service<Stream> + 'static,
{
    let run = move || {
        loop {
            if let Err(error) = serve_until_error(&listener, &service) {
                tracing::error!(%error, "the control socket failed, opening it again");
            }
            // An error such as too many open files may last: no busy loop.
            thread::sleep(Duration::from_millis(100));
        }
    };
    thread::Builder::new().name("control".to_owned()).spawn(run)?;
    Ok(())
}

fn serve_until_error<S>(listener: &UnixListener, service: &impl Fn() -> S) -> Result<(), zlink::Error>
where
    S: Service<Stream> + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let listener = OwnedFd::from(listener.try_clone()?);
    LocalSet::new().block_on(&runtime, async {
        let mut listener = Listener::try_from(listener)?;
        while let Some(connection) = listener.accept().await? {
            let server = Server::new(Once::Accepted(Box::new(connection)), service());
            tokio::task::spawn_local(async {
                if let Err(error) = server.run().await {
                    tracing::debug!(%error, "a client's connection failed");
                }
            });
        }
        Ok(())
    })
}

/// A listener that has accepted its one connection already.
#[derive(Debug)]
enum Once {
    Accepted(Box<Connection>),
    Closing,
    Closed,
}

impl zlink::Listener for Once {
    type Socket = Stream;

    async fn accept(&mut self) -> zlink::Result<Option<Connection>> {
        match std::mem::replace(self, Self::Closing) {
            Self::Accepted(connection) => Ok(Some(*connection)),
            Self::Closing => {
                *self = Self::Closed;
                Ok(None)
            }
            Self::Closed => {
                *self = Self::Closed;
                // The server asks again before it looks at its connections, each time it is told that there are no more.
                std::future::pending().await
            }
        }
    }
}
