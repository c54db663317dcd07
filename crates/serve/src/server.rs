//! Start and end: one thread computes, others talk.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use moebius_engine::Tokenizer;
use moebius_engine::scheduler::Stop;
use moebius_model::Model;
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use crate::error::ApiError;
use crate::options::ServeOptions;
use crate::state::{App, ServedModel};
use crate::{listen, routes};

/// Threads that talk: little work, and the computing threads want the cores.
const TALKING_THREADS: usize = 2;
/// Threads for prompts and grammars.
const PREPARING_THREADS: usize = 16;

/// Why a server could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No threads.
    #[error("cannot start the server's threads: {0}")]
    Threads(std::io::Error),
    /// The address is taken, or not this machine's.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The model's tokenizer cannot be used.
    #[error("{0}")]
    Model(String),
}

/// A server that listens; [`Server::run`] has it answer.
pub struct Server {
    app: App,
    model: Model,
    tokenizer: Arc<Tokenizer>,
    address: SocketAddr,
    talking: JoinHandle<()>,
    handle: Handle,
    end: watch::Sender<bool>,
}

/// Ends a server from another thread.
#[derive(Clone)]
pub struct Ender {
    app: App,
    end: watch::Sender<bool>,
}

impl Ender {
    /// The first time: takes no more requests and finishes what runs; again: ends at once.
    pub fn end(&self) {
        let again = self.end.send_replace(true);
        self.app.scheduler.stop(if again { Stop::Now } else { Stop::WhenDone });
    }
}

impl Server {
    /// Begins to listen. Requests wait until [`Server::run`].
    ///
    /// # Errors
    /// An address that cannot be had, a tokenizer that cannot be used.
    pub fn new(served: ServedModel, options: ServeOptions) -> Result<Self, ServeError> {
        let tokenizer = Arc::new(served.tokenizer.clone());
        let failed = |error: ApiError| ServeError::Model(error.object()["error"]["message"].to_string());
        let app = App::new(&served, tokenizer.clone(), options).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(TALKING_THREADS)
            .max_blocking_threads(PREPARING_THREADS)
            .thread_name("moebius-http")
            .enable_all()
            .build()
            .map_err(ServeError::Threads)?;
        let address = app.options.address;
        let listen = |source| ServeError::Listen { address, source };
        let listener = runtime.block_on(TcpListener::bind(address)).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let (end, ended) = watch::channel(false);
        let handle = runtime.handle().clone();
        let talking = talk(runtime, listener, app.clone(), ended).map_err(ServeError::Threads)?;
        Ok(Self { app, model: served.model, tokenizer, address, talking, handle, end })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends it.
    pub fn ender(&self) -> Ender {
        Ender { app: self.app.clone(), end: self.end.clone() }
    }

    /// Has SIGINT (ctrl-C) and SIGTERM end the server, each further one at once.
    pub fn end_on_signals(&self) {
        let ender = self.ender();
        self.handle.spawn(async move {
            loop {
                if let Err(error) = signal().await {
                    tracing::warn!(%error, "signals cannot be heard");
                    return;
                }
                tracing::info!("asked to end");
                ender.end();
            }
        });
    }

    /// Answers until it is ended: computes on this thread, best one of the pool that the kernels compute with.
    pub fn run(self) {
        self.app.scheduler.run(&self.model, &self.tokenizer);
        self.end.send_replace(true);
        let _ = self.talking.join();
    }
}

/// The threads that talk.
fn talk(
    runtime: Runtime,
    listener: TcpListener,
    app: App,
    mut ended: watch::Receiver<bool>,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("moebius-http".into()).spawn(move || {
        runtime.block_on(async {
            let router = routes::router(app.clone());
            let end = async move { _ = ended.wait_for(|ended| *ended).await };
            listen::serve(listener, router, &app.options, end).await;
        });
        // Whoever still prepares a request is not waited for.
        runtime.shutdown_background();
    })
}

/// Waits for a signal to end.
#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}

/// Waits for a signal to end.
#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}
