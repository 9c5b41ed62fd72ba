"""A camera on this machine that speaks RTSP: enough of RFC 2326 for who plays over TCP."""

from __future__ import annotations

import base64
import socket
import socketserver
import threading

import av
import numpy as np

# MPEG video, which needs no further description (RFC 3551).
_DESCRIPTION = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 32\r\na=control:pictures\r\n"
)

_WHO = 'WWW-Authenticate: Basic realm="a"'


def rtp_packets(frames: np.ndarray, rate: int) -> list[bytes]:
    """Gray frames, uint8 (n, H, W), as RTP packets of MPEG-2 video."""
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


class Camera:
    """Plays a film to whoever connects, once per connection, and then hangs up.

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

        self._server = Threads(("127.0.0.1", 0), Handler)
        who = "" if password is None else password + "@"
        self.url = f"rtsp://{who}127.0.0.1:{self._server.server_address[1]}/live"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _basic(password: str) -> str:
    return "Basic " + base64.b64encode(password.encode()).decode()
