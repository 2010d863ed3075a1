"""Downloads from a server that disconnects, fails, ignores ranges, changes its content or sends wrong headers."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskwright.checkpoints import download as module
from maskwright.checkpoints.catalogue import Entry
from maskwright.checkpoints.download import cache_folder, download, fetch
from maskwright.errors import CheckpointError, DownloadError

pytestmark = pytest.mark.fast

CONTENT = bytes(i * 7 % 251 for i in range(200_000))
SHA = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; each request takes the next of `plan` ("fine" when it is empty) and is noted in `seen`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.plan: list[str] = []
        self.seen: list[tuple[str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.seen.append((wanted, self.headers.get("If-Range")))
        how = server.plan.pop(0) if server.plan else "fine"
        if how.isdigit():
            self.send_error(int(how))
            return
        if how == "hang up":
            self.close_connection = True
            self.connection.close()
            return
        start = 0
        fresh = self.headers.get("If-Range") in (None, server.etag)
        if wanted and fresh and how != "no ranges":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            shift = 5 if how == "wrong range" else 0
            last = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {start + shift}-{last}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", "text/html" if how == "page" else "application/octet-stream")
        if how == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) + {"says more": 1000, "says less": -1000}.get(how, 0)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if how in ("cut", "slow") else body)
        self.wfile.flush()
        if how == "slow":
            threading.Event().wait(1.0)
        if how in ("cut", "slow", "says more", "says less", "no length"):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("MASKWRIGHT_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def get(server: Server, folder: Path, **options: Any) -> Path:
    options = {"sha256": SHA, "pause": 0.01, "timeout": 5.0, "progress": False, **options}
    return download(server.url, folder / "weights.pth", **options)


def assert_whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert not list(path.parent.glob("*.part*"))


def test_a_whole_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    assert_whole(get(server, tmp_path / "new" / "folder"))
    assert_whole(get(server, tmp_path / "new" / "folder"))
    assert server.seen == [(None, None)]


@pytest.mark.parametrize(
    "check", [{"sha256": SHA[:8]}, {"sha256": "", "md5": MD5[:6]}, {"sha256": SHA.upper()}, {"size": 200_000}]
)
def test_prefixes_of_hashes_and_sizes_are_enough(server: Server, tmp_path: Path, check: dict[str, Any]) -> None:
    assert_whole(get(server, tmp_path, **check))


def test_an_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut", "cut"]
    assert_whole(get(server, tmp_path))
    assert server.seen == [(None, None), ("bytes=100000-", '"one"'), ("bytes=150000-", '"one"')]


def test_temporary_errors_of_the_server_are_retried(server: Server, tmp_path: Path) -> None:
    server.plan = ["503", "hang up", "500", "429"]
    assert_whole(get(server, tmp_path))
    assert len(server.seen) == 5


def test_a_later_call_resumes_an_earlier_download(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut", "500"]
    with pytest.raises(
        DownloadError,
        match=r"the download failed after 2 attempts \(the server responded 500 .*\); 100000 bytes are kept",
    ):
        get(server, tmp_path, tries=2)
    assert not (tmp_path / "weights.pth").exists()
    assert_whole(get(server, tmp_path))
    assert server.seen[-1] == ("bytes=100000-", '"one"')


def test_a_download_restarts_if_the_server_ignores_ranges(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut", "no ranges"]
    assert_whole(get(server, tmp_path))
    assert server.seen[-1][0] == "bytes=100000-"


def test_content_that_changed_between_tries_is_not_mixed(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut"]
    with pytest.raises(DownloadError):
        get(server, tmp_path, tries=1)
    server.content, server.etag = CONTENT[::-1], '"two"'
    path = get(server, tmp_path, sha256=hashlib.sha256(CONTENT[::-1]).hexdigest())
    assert path.read_bytes() == CONTENT[::-1]


def test_without_a_validator_only_a_hash_lets_it_go_on(server: Server, tmp_path: Path) -> None:
    server.etag, server.plan = None, ["cut", "fine", "cut", "fine"]
    assert_whole(get(server, tmp_path / "a"))
    assert server.seen[-1] == ("bytes=100000-", None)
    assert_whole(get(server, tmp_path / "b", sha256=""))
    assert server.seen[-1] == (None, None)


def test_two_halves_of_different_files_are_found_by_the_hash_and_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.etag, server.plan = None, ["cut"]
    server.content = CONTENT[::-1]
    with pytest.raises(DownloadError):
        get(server, tmp_path, tries=1)
    server.content = CONTENT
    assert_whole(get(server, tmp_path))
    assert [r for r, _ in server.seen] == [None, "bytes=100000-", None]


def test_a_download_restarts_after_a_wrong_range(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut", "wrong range"]
    assert_whole(get(server, tmp_path))
    assert [r for r, _ in server.seen] == [None, "bytes=100000-", None]


def test_a_part_that_is_whole_already_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    note = {"url": server.url, "validator": '"one"', "total": len(CONTENT)}
    (tmp_path / "weights.pth.part.json").write_text(json.dumps(note))
    assert_whole(get(server, tmp_path))
    (tmp_path / "weights.pth").unlink()
    (tmp_path / "weights.pth.part").write_bytes(CONTENT + b"more")
    (tmp_path / "weights.pth.part.json").write_text(json.dumps(note))
    assert_whole(get(server, tmp_path))


def test_a_part_of_another_address_or_without_a_note_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(b"junk")
    assert_whole(get(server, tmp_path))
    assert server.seen == [(None, None)]


def test_a_file_with_a_wrong_hash_is_removed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        get(server, tmp_path, sha256="00" * 32)
    assert f"sha256 {SHA}, expected {'00' * 32}" in str(caught.value)
    assert "was removed" in str(caught.value)
    assert not list(tmp_path.glob("weights.pth*[!k]"))
    assert len(server.seen) == 1
    with pytest.raises(DownloadError, match=f"md5 {MD5[:8]}, expected 123456"):
        get(server, tmp_path, sha256="", md5="123456")


def test_a_server_that_announces_another_size_is_refused_before_anything_comes(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="expected 5 bytes, the server has 200000; not downloaded"):
        get(server, tmp_path, size=5)


def test_a_wrong_content_length_is_detected(server: Server, tmp_path: Path) -> None:
    server.plan = ["says more"] * 3
    with pytest.raises(DownloadError, match="the connection ended after 200000 of 201000 bytes"):
        get(server, tmp_path, tries=1)
    assert_whole(get(server, tmp_path))
    (tmp_path / "weights.pth").unlink()
    server.plan = ["says less"]
    with pytest.raises(DownloadError, match="the download is not the published file"):
        get(server, tmp_path)
    server.plan = ["no length"]
    assert_whole(get(server, tmp_path))


def test_a_stalled_download_is_retried(server: Server, tmp_path: Path) -> None:
    server.plan = ["slow"]
    assert_whole(get(server, tmp_path, timeout=0.2))
    assert len(server.seen) == 2


def test_a_web_page_instead_of_weights(server: Server, tmp_path: Path) -> None:
    server.plan = ["page"]
    with pytest.raises(DownloadError, match="sent a web page instead of weights"):
        get(server, tmp_path)
    server.content = b"<!DOCTYPE html><html>Log in</html>"
    with pytest.raises(DownloadError, match=r"not the published file \(a web page\) and was removed"):
        get(server, tmp_path, sha256="")
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    ("code", "words"), [("404", "not found"), ("403", "access denied"), ("410", "removed by the server")]
)
def test_permanent_errors_are_not_retried(server: Server, tmp_path: Path, code: str, words: str) -> None:
    server.plan = [code] * 3
    with pytest.raises(DownloadError, match=words):
        get(server, tmp_path)
    assert len(server.seen) == 1


def test_without_network_or_server_the_error_says_so(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"nowhere\.invalid cannot be resolved; check the network"):
        download("http://nowhere.invalid/x.pth", tmp_path / "x.pth", progress=False, pause=0.01)
    with pytest.raises(DownloadError, match=r"after 2 attempts \(no connection: .*refused\); nothing was received"):
        download("http://127.0.0.1:9/x.pth", tmp_path / "x.pth", tries=2, progress=False, pause=0.01)
    with pytest.raises(DownloadError, match="only http and https"):
        download("file:///etc/passwd", tmp_path / "x.pth")


def test_no_request_is_sent_when_offline(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKWRIGHT_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"MASKWRIGHT_OFFLINE is set; unset it, or save the file as .*weights\.pth"):
        get(server, tmp_path)
    assert server.seen == []


def test_a_full_disk_before_and_in_the_middle(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(DownloadError, match=r"needs 0 MB, but only 0 MB are free on its disk"):
        get(server, tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    real = module._copy

    def full(*arguments: Any) -> int:
        real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    with pytest.raises(DownloadError, match=r"the disk is full; free some space, or set MASKWRIGHT_CACHE"):
        get(server, tmp_path)
    assert not (tmp_path / "weights.pth").exists()


def test_a_folder_without_write_access_gives_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DownloadError, match=r"cannot be written \(.*\); set MASKWRIGHT_CACHE to a folder that is writable"
    ):
        get(server, tmp_path / "file" / "below")


def test_concurrent_downloads_fetch_a_file_once(server: Server, tmp_path: Path) -> None:
    server.plan = ["slow"]  # the first holds the lock for a second while the others wait
    threads = [threading.Thread(target=get, args=(server, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(tmp_path / "weights.pth")
    assert len(server.seen) == 2


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1] + ".lock", "a+b")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
open(sys.argv[1], "wb").write(b"from the other process")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the other process locks with fcntl")
def test_a_download_waits_for_another_process(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "weights.pth"
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert other.stdin is not None
        threading.Timer(0.3, other.stdin.close).start()
        get(server, tmp_path)
        other.wait()
    assert target.read_bytes() == b"from the other process"
    assert server.seen == []
    assert "waiting for another process that downloads weights.pth" in capsys.readouterr().err


def test_the_catalogue_is_fetched_into_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "cache"))
    entry = Entry(
        "thing", "mask-rcnn", "them", server.url, "https://code", "MIT", "CC-BY-4.0", "attribution", sha256=SHA[:8]
    )
    path = fetch(entry, progress=False)
    assert path == tmp_path / "cache" / "checkpoints" / "thing" / "weights.pth"
    assert_whole(path)
    shown = capsys.readouterr().err
    assert "weights CC-BY-4.0, code MIT (https://code); commercial use allowed on conditions" in shown
    fetch(entry, progress=False)
    assert capsys.readouterr().err == ""
    assert isinstance(DownloadError("x"), CheckpointError)


def test_control_characters_in_names_and_addresses_are_escaped(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich, which shows the progress bar
    monkeypatch.setenv("COLUMNS", "200")
    name = "a\x9b31m\u202e[red].pth"
    entry = Entry(
        "thing", "mask-rcnn", "them", f"{server.url}/{name}", "https://code\x1b[2J\nb", "MIT", "MIT", "yes", "\x07"
    )
    assert fetch(entry, folder=tmp_path).name == name
    attempts = [True, True, False]  # another process holds the lock once
    monkeypatch.setattr(module, "_lock", lambda _: attempts.pop())
    download(server.url, tmp_path / "b\x9b\x1b[2J.pth", size=len(CONTENT), progress=False)
    server.plan = ["cut"]
    with pytest.raises(DownloadError, match=r"/a\\x9b31m\\u202e\[red\]\.pth: the download failed after 1 attempts"):
        download(entry.url, tmp_path / "c.pth", tries=1, progress=False)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)  # without the colours of rich
    assert r"code MIT (https://code\x1b[2J\nb)" in shown
    assert f"thing: {server.url}/" r"a\x9b31m\u202e[red].pth" in shown
    assert r"  \x07" in shown
    assert r"waiting for another process that downloads b\x9b\x1b[2J.pth" in shown
    assert r"a\x9b31m\u202e[red].pth" in shown.split("checked by")[1]  # the progress bar
    assert not set("\x07\x9b\u202e") & set(shown)
    assert "\x1b[2J" not in shown


def test_the_cache_is_in_the_folder_of_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MASKWRIGHT_CACHE", raising=False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "maskwright"
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "maskwright")
    monkeypatch.setattr(module.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "maskwright"
