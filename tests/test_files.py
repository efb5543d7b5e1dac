"""Files are written whole; links, devices and pipes stay what they are."""

import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from longroll.errors import LongrollError
from longroll.files import check_writable, write_whole


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_whole(path, b"1")
    assert path.read_bytes() == b"1" and path.stat().st_mode & 0o044 == 0o044
    path.chmod(0o600)
    write_whole(path, b"2")
    assert path.read_bytes() == b"2" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "folder" / "link"
    target.parent.mkdir()
    link.parent.mkdir()
    if there:
        target.write_bytes(b"before")
    link.symlink_to("../elsewhere/target")
    second = tmp_path / "second"
    second.symlink_to(link)
    for name in (link, second):
        check_writable(name)
        write_whole(name, b"after")
        assert name.is_symlink() and target.read_bytes() == b"after"
        target.unlink()
    assert [*link.parent.iterdir()] == [link]


def test_a_link_to_a_folder_not_yet_there_can_be_written_into(tmp_path):
    (tmp_path / "link").symlink_to("made/later")
    check_writable(tmp_path / "link", folder=True)
    write_whole(tmp_path / "link" / "x", b"1")
    assert (tmp_path / "made/later/x").read_bytes() == b"1"


def test_a_device_stays_a_device(tmp_path):
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for name in (os.devnull, link):
        before = os.stat(name)
        write_whole(check_writable(type(tmp_path)(name)), b"1")
        assert stat.S_ISCHR(os.stat(name).st_mode) and os.stat(name).st_ino == before.st_ino


def test_a_pipe_is_written_into(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    check_writable(fifo)
    write_whole(fifo, b"123")
    reader.join(10)
    assert read == [b"123"] and stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_socket_is_refused_and_stays(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(LongrollError, match="Cannot write"):
            write_whole(path, b"1")
        assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_that_is_a_file_is_appended_to_not_replaced(tmp_path, name):
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = f"from longroll.files import write_whole; write_whole({name!r}, b'2')"
    shell = f'exec > all; printf 1; {sys.executable} -c "{code}"; printf 3'
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, check=True)
    assert (tmp_path / "all").read_text() == "123"
