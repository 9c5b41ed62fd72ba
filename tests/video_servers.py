"""Videos served on this machine: files over HTTP, and a camera that speaks RTSP."""

from __future__ import annotations

import base64
import http.server
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any

import numpy as np

# MPEG video, which needs no further description (RFC 3551).
_DESCRIPTION = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 32\r\na=control:pictures\r\n"
)

_WHO = 'WWW-Authenticate: Basic realm="a"'


class _Served:
    """A server on a thread of its own, until the end of a `with` block."""

    def _serve(self, server: Any) -> str:
        """Starts it; returns its address."""
        self._server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_address[1]}"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Server(_Served):
    """A local HTTP server of files; `cut` sends only so many bytes of them, `silent` none; `live`
    does not say how many there will be, as a camera."""

    def __init__(
        self, folder: Path, cut: int | None = None, silent: bool = False, live: bool = False
    ) -> None:
        stop = self.stop = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if silent:
                    stop.wait(20)
                    return
                content = (folder / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream")
                if live:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(content)))
                self.send_header("Connection", "close")
                self.end_headers()
                if live:
                    content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
                self.wfile.write(content[:cut])

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://{self._serve(server)}"

    def close(self) -> None:
        self.stop.set()
        super().close()


def rtp_packets(frames: np.ndarray, rate: int) -> list[bytes]:
    """Gray frames, uint8 (n, H, W), as RTP packets of MPEG-2 video."""
    import av  # Not everywhere: the tests that need it are skipped then.

    packets: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inbox:
        inbox.bind(("127.0.0.1", 0))
        inbox.settimeout(0.5)
        port = inbox.getsockname()[1]

        def drain() -> None:
            try:
                while True:
                    packet = inbox.recv(1 << 16)
                    # Reports of the sender (RTCP) go to the port above.
                    packets.append(packet)
                    inbox.settimeout(0.01)
            except TimeoutError:
                inbox.settimeout(0.5)

        with av.open(f"rtp://127.0.0.1:{port}", "w", format="rtp") as container:
            stream = container.add_stream("mpeg2video", rate=rate, options={"qmax": "2"})
            stream.width, stream.height, stream.pix_fmt = (
                frames.shape[2],
                frames.shape[1],
                "yuv420p",
            )
            for pixels in (*frames, None):
                frame = None if pixels is None else av.VideoFrame.from_ndarray(pixels, "gray")
                for packet in stream.encode(frame):
                    container.mux(packet)
                    # One at a time: a full inbox would lose some.
                    drain()
    return packets


class Camera(_Served):
    """Plays a film to whoever connects, once per connection, and then hangs up.

    It speaks enough of RTSP (RFC 2326) for who wants packets over TCP.

    Args:
        frames: the film, uint8 (n, H, W).
        rate: frames a second that the film claims; it is sent at once.
        password: "user:password" that a client must send (RFC 7617), or None.

    Attributes:
        url: where it is.
        connections: how many have asked to play so far.
    """

    def __init__(self, frames: np.ndarray, rate: int = 25, password: str | None = None) -> None:
        packets = rtp_packets(frames, rate)
        camera = self
        self.connections = 0

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while request := self._request():
                    method, headers = request
                    if password is not None and headers.get("authorization") != _basic(password):
                        self._answer(headers, "401 Unauthorized", _WHO)
                    elif method == "OPTIONS":
                        self._answer(headers, "200 OK", "Public: DESCRIBE, SETUP, PLAY, TEARDOWN")
                    elif method == "DESCRIBE":
                        kind = "Content-Type: application/sdp"
                        self._answer(headers, "200 OK", kind, body=_DESCRIPTION)
                    elif method == "SETUP":
                        transport = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1"
                        self._answer(headers, "200 OK", transport, "Session: 1")
                    elif method == "PLAY":
                        camera.connections += 1
                        self._answer(headers, "200 OK", "Session: 1")
                        for packet in packets:
                            self.wfile.write(b"$\0" + len(packet).to_bytes(2, "big") + packet)
                        return
                    else:
                        return

            def _request(self) -> tuple[str, dict[str, str]] | None:
                lines = iter(lambda: self.rfile.readline().decode().strip(), "")
                first = next(lines, None)
                if first is None:
                    return None
                pairs = (line.partition(":") for line in lines)
                return first.split()[0], {name.lower(): text.strip() for name, _, text in pairs}

            def _answer(
                self, headers: dict[str, str], status: str, *lines: str, body: str = ""
            ) -> None:
                head = [f"RTSP/1.0 {status}", f"CSeq: {headers['cseq']}", *lines]
                if body:
                    head.append(f"Content-Length: {len(body)}")
                self.wfile.write(("\r\n".join(head) + "\r\n\r\n" + body).encode())

        class Threads(socketserver.ThreadingTCPServer):
            daemon_threads = True
            # Who has seen enough hangs up in the middle of the film.
            handle_error = staticmethod(lambda *_: None)

        who = "" if password is None else password + "@"
        self.url = f"rtsp://{who}{self._serve(Threads(('127.0.0.1', 0), Handler))}/live"


def _basic(password: str) -> str:
    return "Basic " + base64.b64encode(password.encode()).decode()
