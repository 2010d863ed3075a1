"""Downloads from servers that cut, redirect, drip or send odd headers, and from odd addresses to odd places."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.checkpoints import web
from maskwright.checkpoints.download import cache_folder, download
from maskwright.errors import DownloadError

pytestmark = pytest.mark.fast


def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.arange(600.0)}, buffer)
    return buffer.getvalue()


BODY = weights()
SHA = hashlib.sha256(BODY).hexdigest()
Answer = bytes | Callable[[socket.socket], None]


def reply(body: bytes = BODY, status: str = "200 OK", **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(body: bytes = BODY, size: int = 700, end: bytes = b"0\r\n\r\n") -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + end
    return reply(coded, Transfer_Encoding="chunked")


class Server:
    """Sends the next of `answers` to each connection, byte by byte as given, and closes it."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.answers: list[Answer] = []
        self.requests: list[str] = []
        threading.Thread(target=self.run, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/x.pth"

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                self.requests.append(connection.recv(65536).decode("latin-1"))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if callable(answer):
                    answer(connection)
                else:
                    connection.sendall(answer)
            except OSError:
                pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("MASKWRIGHT_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    running = Server()
    yield running
    running.listening.close()


def get(server: Server, folder: Path, *answers: Answer, url: str = "", **options: Any) -> bytes:
    server.answers = list(answers)
    options = {"pause": 0.01, "timeout": 3.0, "progress": False, "tries": 3, **options}
    return download(url or server.url, folder / "x.pth", **options).read_bytes()


def assert_nothing_there(folder: Path) -> None:
    assert not (folder / "x.pth").exists()


# ---- cut off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", b"5", b"5\r\nab", b"zz\r\n", b"ffffffffff\r\nab"])
@pytest.mark.parametrize("check", ["", SHA])
def test_a_chunked_answer_that_is_cut_is_never_taken_as_whole(
    server: Server, tmp_path: Path, end: bytes, check: str
) -> None:
    cut = chunked(BODY[:2100], end=end)
    with pytest.raises(DownloadError, match=r"failed after 3 attempts \((the connection|the size)"):
        get(server, tmp_path, cut, sha256=check)
    assert_nothing_there(tmp_path)
    assert get(server, tmp_path, cut, chunked(), sha256=check) == BODY


def test_without_size_and_hash_the_file_must_be_readable(server: Server, tmp_path: Path) -> None:
    open_end = {"Connection": "close"}
    for body in (BODY[:-30], BODY[:700], b"no weights at all"):
        with pytest.raises(DownloadError, match="the size is not known, and what was received is no whole checkpoint"):
            get(server, tmp_path, reply(body, **open_end))
        assert_nothing_there(tmp_path)
    assert get(server, tmp_path, reply(BODY[:-30], **open_end), reply(**open_end)) == BODY
    assert not list(tmp_path.glob("*.part*"))


def test_more_than_announced_is_never_kept(server: Server, tmp_path: Path) -> None:
    answer = reply(BODY + b"more", Content_Length=len(BODY))
    assert get(server, tmp_path, answer) == BODY


# ---- redirects -------------------------------------------------------------------------------------------------------


def to(where: str, status: str = "302 Found") -> bytes:
    return reply(b"", status, Location=where, Content_Length=0)


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,abc", "gopher://x/", "FILE:///x"])
def test_redirects_to_other_schemes_are_refused(server: Server, tmp_path: Path, status: str, where: str) -> None:
    for hops in ((), (to("/elsewhere"),), (to("/a"), to("/b"))):
        with pytest.raises(DownloadError, match=r"redirects to .*, which is not an http or https address"):
            get(server, tmp_path, *hops, to(where, status))
        assert_nothing_there(tmp_path)


def test_redirects_within_http_are_followed(server: Server, tmp_path: Path) -> None:
    assert get(server, tmp_path, to("/other"), to(server.url), reply(Content_Length=len(BODY))) == BODY
    assert [r.split()[1] for r in server.requests] == ["/x.pth", "/other", "/x.pth"]


@pytest.mark.parametrize("where", ["http://[::1", "http://127.0.0.1:99999/x", "http://a..b/x", "", "http://", "//"])
def test_odd_redirects_are_sentences(server: Server, tmp_path: Path, where: str) -> None:
    with pytest.raises(DownloadError):
        get(server, tmp_path, to(where), tries=1)


def test_a_loop_of_redirects_ends(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refused the request"):
        get(server, tmp_path, to("/x.pth"))


def test_https_is_never_left_at_any_hop() -> None:
    handler = web._Redirects("https://a/x")
    with pytest.raises(DownloadError, match="redirects to an unencrypted address, http://b/x"):
        web.check_redirect("https://a/x", "http://b/x", handler.encrypted)
    later = web._Redirects("http://a/x")
    assert not later.encrypted
    request = web.urllib.request.Request("http://a/x")
    assert later.redirect_request(request, None, 302, "", {}, "https://b/x").full_url == "https://b/x"
    with pytest.raises(DownloadError, match="redirects to an unencrypted address"):
        later.redirect_request(request, None, 302, "", {}, "http://c/x")


# ---- slow ------------------------------------------------------------------------------------------------------------


def dripping(start: bytes, drip: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(200):
            time.sleep(0.05)
            connection.sendall(drip)

    return send


@pytest.mark.parametrize(
    ("start", "drip"),
    [
        (reply(b"", Content_Length=10**6), b"x"),
        (reply(b"", Transfer_Encoding="chunked"), b"1\r\nx\r\n"),
        (reply(b"", Transfer_Encoding="chunked"), b"0"),
        (reply(b""), b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"b"),
        (b"", b"H"),
    ],
)
def test_a_server_that_drips_is_given_up(server: Server, tmp_path: Path, start: bytes, drip: bytes) -> None:
    begun = time.monotonic()
    with pytest.raises(DownloadError, match=r"less than 1024 bytes per second|the connection was lost"):
        get(server, tmp_path, dripping(start, drip), timeout=0.3)
    assert time.monotonic() - begun < 5
    assert_nothing_there(tmp_path)


# ---- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Length": "9" * 5000},
        {"Content_Length": "-5"},
        {"Content_Length": "\xb2"},
        {"Content_Length": ""},
        {"Content_Type": "\xff/\xfe; ;;"},
        {"ETag": '"\xe9\x01"', "Content_Length": len(BODY)},
        {"Last_Modified": "x" * 5000, "Content_Length": len(BODY)},
        {"Content_Encoding": "Identity", "Content_Length": len(BODY)},
        {"Content_Range": "bytes 5-2/1"},
    ],
)
def test_odd_headers_are_ignored(server: Server, tmp_path: Path, headers: dict[str, Any]) -> None:
    assert get(server, tmp_path, reply(**headers), sha256=SHA) == BODY


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n",
        reply(Content_Encoding="gzip", Content_Length=len(BODY)),
        reply(b"", "204 No Content"),
        reply(b"", "304 Not Modified"),
        reply(status="206 Partial Content", Content_Range="bytes " + "9" * 5000 + "-5/7"),
        reply(status="206 Partial Content", Content_Range=f"bytes 3-{len(BODY) + 2}/{len(BODY) + 3}"),
        reply(Content_Length="9" * 17),
        reply(Content_Length="9" * 15),
        reply(b"", "418 \x1b[31mred", Content_Length=0),
    ],
)
def test_odd_answers_are_sentences(server: Server, tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(DownloadError) as caught:
        get(server, tmp_path, answer, sha256=SHA, tries=2)
    assert "\x1b" not in str(caught.value)
    assert_nothing_there(tmp_path)


def test_a_range_that_nobody_asked_for_is_taken_if_it_is_the_whole(server: Server, tmp_path: Path) -> None:
    whole = reply(
        status="206 Partial Content", Content_Range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}", Content_Length=len(BODY)
    )
    assert get(server, tmp_path, whole) == BODY


# ---- what lies beside, addresses and places --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"url": 5, "validator": [], "total": "x"}',
        b'{"url": "URL", "validator": "a\\nX-Evil: b", "total": 5}',
        b'{"url": "URL", "validator": "\\u20ac", "total": -1}',
        b'{"url": "URL", "validator": "v", "total": 1e400}',
        b'{"url": "URL", "validator": "v", "total": ' + b"9" * 4000 + b"}",
        b'{"url": "URL", "validator": "v", "more": 1}',
    ],
)
def test_damaged_notes_of_an_earlier_download_do_not_matter(server: Server, tmp_path: Path, note: bytes) -> None:
    (tmp_path / "x.pth.part").write_bytes(BODY[:100])
    (tmp_path / "x.pth.part.json").write_bytes(note.replace(b"URL", server.url.encode()))
    assert get(server, tmp_path, reply(Content_Length=len(BODY)), sha256=SHA) == BODY
    assert "X-Evil" not in server.requests[0]


def test_a_part_that_is_larger_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.pth.part").write_bytes(BODY + b"12345")
    (tmp_path / "x.pth.part.json").write_text(json.dumps({"url": server.url, "validator": '"v"', "total": len(BODY)}))
    rest = reply(b"", "206 x", Content_Range=f"bytes {len(BODY) + 5}-{len(BODY) + 9}/{len(BODY)}", Content_Length=5)
    assert get(server, tmp_path, rest, reply(Content_Length=len(BODY))) == BODY


def test_links_and_folders_in_the_place_of_files(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    (tmp_path / "x.pth.part").symlink_to(other)
    assert get(server, tmp_path, reply(Content_Length=len(BODY))) == BODY
    assert other.read_bytes() == b"precious"
    for name in ("x.pth", "x.pth.part", "x.pth.part.json", "x.pth.lock"):
        folder = tmp_path / f"in-{name}"
        (folder / name).mkdir(parents=True)
        (folder / name / "content").touch()
        with pytest.raises(DownloadError, match=r"cannot be written|is not a file"):
            get(server, folder, reply(Content_Length=len(BODY)), tries=1)


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "http://[::1", "http://a:b/x", "http://a:99999999/x", "http://a b/x", "http://a/\r\nX: y",
     "http://" + "a" * 70 + "/x", "http://\xfc..\xe4/x", "HTTP:x", "", "x", "javascript:1", "http://127.0.0.1:0/x",
     "http://a\0b/x"],
)  # fmt: skip
def test_odd_addresses_are_sentences(server: Server, tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError):
        download(url, tmp_path / "x.pth", tries=1, progress=False, timeout=2.0)
    assert_nothing_there(tmp_path)


def test_addresses_with_unusual_characters_work(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}/w\xe4ights \u20ac.pth?a=%20b".replace(" \u20ac", "\u20ac")
    assert get(server, tmp_path, reply(Content_Length=len(BODY)), url=url) == BODY
    assert server.requests[0].startswith("GET /w%C3%A4ights%E2%82%AC.pth?a=%20b ")


def test_odd_cache_folders_are_sentences(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKWRIGHT_CACHE", "~no-such-user-here/cache")
    with pytest.raises(DownloadError, match="in a home folder that does not exist; set MASKWRIGHT_CACHE"):
        cache_folder()
    for name in ("a" * 300, "b\0c"):
        with pytest.raises(DownloadError):
            download(server.url, tmp_path / name / "x.pth", progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        download(server.url, tmp_path / "file" / "x.pth", progress=False)
