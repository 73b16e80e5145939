"""A head that goes is told of once, and again when it is back."""

import logging
import socket
import time

import pytest

from zsplg_ray.cluster import headwatch


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(headwatch, "PERIOD_S", 0.05)
    return socket.create_server(("127.0.0.1", 0))


def until(there) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_line_when_it_is_gone_and_one_when_it_is_back(head, caplog):
    caplog.set_level(logging.INFO)
    host, port = head.getsockname()
    with headwatch.watched_head(f"{host}:{port}"):
        head.settimeout(30)
        for _ in range(3):
            head.accept()[0].close()  # it looks, and all is well
        assert not caplog.records
        head.close()
        until(lambda: caplog.records)
        assert f"the head of the Ray cluster at {host}:{port} does not answer" in caplog.text
        assert caplog.records[0].levelno == logging.ERROR
        with socket.create_server((host, port)):
            until(lambda: len(caplog.records) > 1)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert "is back" in caplog.records[1].getMessage()


def test_no_thread_is_left(head):
    import threading

    host, port = head.getsockname()
    with headwatch.watched_head(f"{host}:{port}"):
        (watch,) = (t for t in threading.enumerate() if t.name == "headwatch")
    watch.join(30)
    assert not watch.is_alive()
    head.close()
