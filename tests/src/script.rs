//! A program as a list of steps: what it sends, reads and closes, in which order. `lab-app talk` runs a script on a
//! connection that it makes, `lab-app serve` on each that it takes.
//!
//! Each step prints one JSON line when it is done: `{"connection":0,"step":"line","ok":true,...}`. After a step that
//! failed the script ends, and the line says the error by its errno name.
//!
//! *Invariant:* every payload that a step sends comes from the script: the test decides what carries the marker.

use crate::{clock, dial, pattern};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// One thing to do with a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// `send:TEXT`: with `\n` and `\r` as escapes.
    Send(String),
    /// `line`: reads to the next newline, or to the end after at least one byte, and shows it.
    Line,
    /// `read:N`: reads exactly so many bytes.
    Read(u64),
    /// `to-end`: reads until the other end says that it is done; short texts are shown.
    ToEnd,
    /// `half-close`: says that it is done.
    HalfClose,
    /// `reset`: ends by RST.
    Reset,
    /// `close`: ends.
    Close,
    /// `sleep:MS`.
    Sleep(u64),
    /// `pattern:N`: sends so many bytes of the numbered pattern.
    Pattern(u64),
    /// `both:N`: sends and reads so many bytes at the same time.
    Both(u64),
    /// `slowly:N:BYTES:MS`: reads so many bytes, a few at a time.
    Slowly(u64, usize, u64),
    /// `fill:MS`: sends until nothing was taken for so long, and tells how much was.
    Fill(u64),
    /// `echo`: sends back what comes until the end.
    Echo,
    /// `wait`: waits for a line on standard input.
    Wait,
    /// `names`: shows both addresses.
    Names,
}

impl FromStr for Step {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let number = || rest.parse::<u64>().with_context(|| format!("step {text}: want a number"));
        Ok(match name {
            "send" => Self::Send(rest.replace("\\r", "\r").replace("\\n", "\n")),
            "line" => Self::Line,
            "read" => Self::Read(number()?),
            "to-end" => Self::ToEnd,
            "half-close" => Self::HalfClose,
            "reset" => Self::Reset,
            "close" => Self::Close,
            "sleep" => Self::Sleep(number()?),
            "pattern" => Self::Pattern(number()?),
            "both" => Self::Both(number()?),
            "slowly" => {
                let words: Vec<u64> = rest.split(':').map(str::parse).collect::<Result<_, _>>()?;
                let [bytes, piece, pause] = words[..] else { bail!("want slowly:N:BYTES:MS") };
                Self::Slowly(bytes, usize::try_from(piece)?, pause)
            }
            "fill" => Self::Fill(number()?),
            "echo" => Self::Echo,
            "wait" => Self::Wait,
            "names" => Self::Names,
            other => bail!("no step is called {other}"),
        })
    }
}

/// Writes one JSON line, whole.
pub fn say(value: &Value) {
    let _ = io::stdout().lock().write_all(format!("{value}\n").as_bytes());
}

/// Runs the steps on a connection. False if one failed.
pub fn run(mut stream: TcpStream, steps: &[Step], connection: usize, marker: &str) -> bool {
    for step in steps {
        let began = Instant::now();
        let name = name(step);
        let outcome = match step {
            Step::Reset => {
                let outcome = dial::reset(stream);
                say(&line(connection, name, began, outcome.map(|()| json!({}))));
                return true;
            }
            Step::Close => {
                drop(stream);
                say(&line(connection, name, began, Ok(json!({}))));
                return true;
            }
            other => perform(other, &mut stream, marker),
        };
        let good = outcome.is_ok();
        say(&line(connection, name, began, outcome));
        if !good {
            return false;
        }
    }
    true
}

fn line(connection: usize, step: &str, began: Instant, outcome: io::Result<Value>) -> Value {
    let mut line = match outcome {
        Ok(mut value) => {
            value["ok"] = json!(true);
            value
        }
        Err(error) => json!({ "ok": false, "error": dial::name(&error) }),
    };
    line["connection"] = json!(connection);
    line["step"] = json!(step);
    line["ms"] = json!(began.elapsed().as_millis() as u64);
    line
}

fn name(step: &Step) -> &'static str {
    match step {
        Step::Send(_) => "send",
        Step::Line => "line",
        Step::Read(_) => "read",
        Step::ToEnd => "to-end",
        Step::HalfClose => "half-close",
        Step::Reset => "reset",
        Step::Close => "close",
        Step::Sleep(_) => "sleep",
        Step::Pattern(_) => "pattern",
        Step::Both(_) => "both",
        Step::Slowly(..) => "slowly",
        Step::Fill(_) => "fill",
        Step::Echo => "echo",
        Step::Wait => "wait",
        Step::Names => "names",
    }
}

fn perform(step: &Step, stream: &mut TcpStream, marker: &str) -> io::Result<Value> {
    let sum = |sum: pattern::Sum| json!({ "bytes": sum.bytes, "sha256": sum.sha256 });
    Ok(match step {
        Step::Send(text) => {
            stream.write_all(text.as_bytes())?;
            json!({ "bytes": text.len() })
        }
        Step::Line => {
            // Byte by byte: what follows the line is for the next step.
            let mut text = Vec::new();
            let mut byte = [0];
            while text.last() != Some(&b'\n') {
                if read(stream, &mut byte)? == 0 {
                    break;
                }
                text.push(byte[0]);
            }
            let hex: String = text.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            if text.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            json!({ "text": String::from_utf8_lossy(&text).trim_end(), "hex": hex })
        }
        Step::Read(bytes) => sum(pattern::read(stream, Some(*bytes))?),
        Step::ToEnd => to_end(stream)?,
        Step::HalfClose => {
            stream.shutdown(Shutdown::Write)?;
            json!({})
        }
        Step::Sleep(millis) => {
            std::thread::sleep(Duration::from_millis(*millis));
            json!({})
        }
        Step::Pattern(bytes) => sum(pattern::write(stream, marker, *bytes)?),
        Step::Both(bytes) => {
            let mut other = stream.try_clone()?;
            let (sent, read) = std::thread::scope(|scope| {
                let writer = scope.spawn(|| pattern::write(&mut other, marker, *bytes));
                let read = pattern::read(stream, Some(*bytes));
                (writer.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())), read)
            });
            let (sent, read) = (sent?, read?);
            json!({ "bytes": read.bytes, "sha256": read.sha256, "sent": sent.sha256 })
        }
        Step::Slowly(bytes, piece, pause) => {
            let mut summing = pattern::Summing::default();
            let mut buffer = vec![0; *piece];
            let mut left = *bytes;
            while left > 0 {
                let room = usize::try_from(left).unwrap_or(usize::MAX).min(*piece);
                let size = read(stream, &mut buffer[..room])?;
                if size == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                summing.add(&buffer[..size]);
                left -= size as u64;
                std::thread::sleep(Duration::from_millis(*pause));
            }
            sum(summing.sum())
        }
        Step::Fill(quiet) => fill(stream, marker, Duration::from_millis(*quiet))?,
        Step::Echo => {
            let mut buffer = vec![0; 64 * 1024];
            let mut bytes = 0;
            loop {
                let size = read(stream, &mut buffer)?;
                if size == 0 {
                    break;
                }
                stream.write_all(&buffer[..size])?;
                bytes += size;
            }
            json!({ "bytes": bytes })
        }
        Step::Wait => {
            let mut text = String::new();
            io::stdin().lock().read_line(&mut text)?;
            json!({ "text": text.trim_end() })
        }
        Step::Names => {
            json!({ "local": stream.local_addr()?.to_string(), "peer": stream.peer_addr()?.to_string() })
        }
        Step::Reset | Step::Close => json!({}),
    })
}

/// io_uring finishes its work by interrupting the task, so a read right after it may have to be done again.
fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn to_end(stream: &mut TcpStream) -> io::Result<Value> {
    let mut summing = pattern::Summing::default();
    let mut text = Vec::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let size = read(stream, &mut buffer)?;
        if size == 0 {
            break;
        }
        summing.add(&buffer[..size]);
        if text.len() < 4096 {
            text.extend_from_slice(&buffer[..size.min(4096 - text.len())]);
        }
    }
    let sum = summing.sum();
    let text = if sum.bytes <= 4096 { String::from_utf8_lossy(&text).into_owned() } else { String::new() };
    Ok(json!({ "bytes": sum.bytes, "sha256": sum.sha256, "text": text }))
}

fn fill(stream: &mut TcpStream, marker: &str, quiet: Duration) -> io::Result<Value> {
    let block: Vec<u8> = marker.bytes().chain(*b"\n").cycle().take(64 * 1024).collect();
    stream.set_nonblocking(true)?;
    let mut taken = 0_u64;
    let mut last = Instant::now();
    let mut at = 0;
    while last.elapsed() < quiet {
        match stream.write(&block[at..]) {
            Ok(size) => {
                taken += size as u64;
                at = (at + size) % block.len();
                last = Instant::now();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(json!({ "bytes": taken }))
}

/// How long a program of the lab waits for anything before it says `EAGAIN`.
pub fn patience() -> Duration {
    clock::seconds(60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_as_written() {
        assert_eq!("send:a:b\\r\\n".parse::<Step>().unwrap(), Step::Send("a:b\r\n".to_owned()));
        assert_eq!("slowly:10:2:3".parse::<Step>().unwrap(), Step::Slowly(10, 2, 3));
        assert!("slowly:10".parse::<Step>().is_err());
        assert!("dance".parse::<Step>().is_err());
        assert!("read:x".parse::<Step>().is_err());
    }
}
