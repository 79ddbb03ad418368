//! A VMM's API as its clients use it: one request after another over a Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects, as soon as somebody listens.
    pub fn connect(path: &str) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(error).with_context(|| format!("no API at {path}")),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks for something.
    pub fn get(&mut self, call: &str) -> Result<Value> {
        self.ask("GET", call, "")
    }

    /// Has something done.
    pub fn put(&mut self, call: &str, body: &Value) -> Result<Value> {
        self.ask("PUT", call, &body.to_string())
    }

    fn ask(&mut self, verb: &str, call: &str, body: &str) -> Result<Value> {
        let head = match body.len() {
            0 => String::new(),
            length => format!("content-type: application/json\r\ncontent-length: {length}\r\n"),
        };
        let request =
            format!("{verb} /api/v1/{call} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n{body}");
        self.0.get_mut().write_all(request.as_bytes())?;
        let (status, body) = self.answer().with_context(|| format!("{verb} {call}"))?;
        let text = String::from_utf8_lossy(&body);
        ensure!(status < 300, "{verb} {call}: {status} {text}");
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).with_context(|| format!("{call} answers {text}"))
    }

    fn answer(&mut self) -> Result<(u16, Vec<u8>)> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.with_context(|| format!("{line:?} is no answer"))?;
        let mut length = 0;
        loop {
            line.clear();
            if self.0.read_line(&mut line)? == 0 {
                bail!("the answer has no end");
            }
            let lower = line.trim_end().to_lowercase();
            if lower.is_empty() {
                break;
            }
            if let Some(text) = lower.strip_prefix("content-length:") {
                length = text.trim().parse().context("the answer's length")?;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((status, body))
    }
}
