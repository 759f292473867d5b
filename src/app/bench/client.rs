//! HTTP/1.1 over one kept connection, and nothing more: the clients share the cores with the server that they measure.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// A request's first line, type and body.
pub(super) struct Request<'a> {
    /// GET, POST, ...
    pub(super) method: &'a str,
    /// With its query.
    pub(super) path: &'a str,
    /// Of the body.
    pub(super) content_type: &'a str,
    /// May be empty.
    pub(super) body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Of JSON.
    pub(super) fn json(path: &'a str, body: &'a [u8]) -> Self {
        Self { method: "POST", path, content_type: "application/json", body }
    }
}

/// A status and the whole body.
pub(super) struct Answer {
    /// 200 and so on.
    pub(super) status: u16,
    /// Unpacked from its chunks.
    pub(super) body: Vec<u8>,
}

/// How the end of a body is known.
enum Length {
    Known(usize),
    Chunked,
}

/// One connection, one request at a time.
pub(super) struct Connection {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    host: String,
}

impl Connection {
    /// Connects.
    pub(super) async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        Ok(Self { reader: BufReader::with_capacity(16 << 10, reader), writer, host: address.to_string() })
    }

    /// Sends, and collects the answer.
    pub(super) async fn send(&mut self, request: &Request<'_>) -> io::Result<Answer> {
        let mut body = Vec::new();
        let status = self.stream(request, |piece| body.extend_from_slice(piece)).await?;
        Ok(Answer { status, body })
    }

    /// Sends, and hands over each piece of the answer when it is there; the answer may begin before all is sent.
    pub(super) async fn stream(&mut self, request: &Request<'_>, piece: impl FnMut(&[u8])) -> io::Result<u16> {
        let Self { reader, writer, host } = self;
        let sending = async {
            let Request { method, path, content_type, body } = request;
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            // One write, one packet, where that is possible.
            if body.len() < 8 << 10 {
                writer.write_all(&[head.as_bytes(), body].concat()).await
            } else {
                writer.write_all(head.as_bytes()).await?;
                writer.write_all(body).await
            }
        };
        let ((), status) = tokio::try_join!(sending, receive(reader, piece))?;
        Ok(status)
    }
}

async fn receive(reader: &mut BufReader<OwnedReadHalf>, mut piece: impl FnMut(&[u8])) -> io::Result<u16> {
    let mut line = String::new();
    read_line(reader, &mut line).await?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| strange("status", &line))?;
    let length = head(reader, &mut line).await?;
    let mut buffer = Vec::new();
    match length {
        Length::Known(0) => {}
        Length::Known(bytes) => {
            buffer.resize(bytes, 0);
            reader.read_exact(&mut buffer).await?;
            piece(&buffer);
        }
        Length::Chunked => loop {
            read_line(reader, &mut line).await?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let bytes = usize::from_str_radix(size, 16).map_err(|_| strange("chunk", &line))?;
            buffer.resize(bytes + 2, 0);
            reader.read_exact(&mut buffer).await?; // with the line's end after it
            if bytes == 0 {
                break;
            }
            piece(&buffer[..bytes]);
        },
    }
    Ok(status)
}

/// Reads the header lines; what is left is the body.
async fn head(reader: &mut BufReader<OwnedReadHalf>, line: &mut String) -> io::Result<Length> {
    let mut length = Length::Known(0);
    loop {
        read_line(reader, line).await?;
        let Some((name, value)) = line.split_once(':') else {
            return if line.is_empty() { Ok(length) } else { Err(strange("header", line)) };
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = Length::Known(value.trim().parse().map_err(|_| strange("content-length", value))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked") {
            length = Length::Chunked;
        }
    }
}

/// A line without its end.
async fn read_line(reader: &mut BufReader<OwnedReadHalf>, line: &mut String) -> io::Result<()> {
    line.clear();
    if reader.read_line(line).await? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
    }
    line.truncate(line.trim_end().len());
    Ok(())
}

fn strange(what: &str, text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a strange {what} in the server's answer: {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// A server that reads one request with an empty body and answers with this text, once.
    async fn answering(text: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"\r\n\r\n") {
                seen.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(text.as_bytes()).await.unwrap();
        });
        address
    }

    async fn get(text: &'static str) -> io::Result<(u16, Vec<String>)> {
        let mut connection = Connection::open(answering(text).await).await?;
        let mut pieces = Vec::new();
        let take = |piece: &[u8]| pieces.push(String::from_utf8_lossy(piece).into_owned());
        let status = connection.stream(&Request::json("/", b""), take).await?;
        Ok((status, pieces))
    }

    #[tokio::test]
    async fn both_kinds_of_bodies_are_read_to_their_end() {
        let known = get("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").await.unwrap();
        assert_eq!(known, (200, vec!["hello".to_owned()]));
        let chunked =
            get("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n3\r\nab\n\r\n1;x=y\r\nc\r\n0\r\n\r\n");
        assert_eq!(chunked.await.unwrap(), (201, vec!["ab\n".to_owned(), "c".to_owned()]));
        assert_eq!(get("HTTP/1.1 204 No Content\r\n\r\n").await.unwrap(), (204, vec![]));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        for text in ["", "hello\r\n", "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "HTTP/1.1 200 OK\r\nbad\r\n\r\n"]
        {
            assert!(get(text).await.is_err(), "{text:?}");
        }
    }
}
