"""Places to mirror to: a folder as file://, and a local S3 server behind a proxy that can cut connections."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from turbolm.storage import Remote, open_url

HAS_S3 = all(importlib.util.find_spec(name) is not None for name in ("s3fs", "moto", "flask"))
needs_s3 = pytest.mark.skipif(not HAS_S3, reason="s3fs and moto[server] are not installed")


@dataclass
class Proxy:
    """Forwards TCP connections; each of the first `cuts` that carries `after_bytes` in one direction is cut there."""

    upstream: int
    cuts: int = 0
    after_bytes: int = 0
    num_cut: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(("127.0.0.1", self.upstream))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        carried = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                carried += len(data)
                with self.lock:
                    is_cut = carried > self.after_bytes and self.num_cut < self.cuts
                    self.num_cut += is_cut
                if is_cut:
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An S3 server with the bucket `bucket`, reached through the proxy that this yields."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    with urlopen(Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")):
        pass  # the servers of a process share what they hold
    proxy = Proxy(port)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        open_url("s3://bucket", "test").fs.mkdir("bucket")
        yield proxy
    finally:
        proxy.server.close()
        server.stop()


def flip_byte(remote: Remote) -> None:
    """Change one byte of what is stored, and not its size."""
    content = bytearray(remote.read() or b"")
    content[len(content) // 2] ^= 1
    remote.write(bytes(content))


def content_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
