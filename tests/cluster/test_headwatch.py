"""A head that goes is told of once, and again when it is back."""

import contextlib
import logging
import socket
import time
from types import SimpleNamespace

import pytest

from zsplg_ray.cluster import headwatch, session
from zsplg_ray.config import RayConfig


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


@pytest.mark.parametrize("from_afar", [True, False])
def test_a_head_behind_a_proxy_is_not_watched(from_afar, monkeypatch):
    watched = []

    @contextlib.contextmanager
    def noting(address):
        watched.append(address)
        yield

    connected = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(session, "watched_head", noting)
    monkeypatch.setattr(session.client, "is_connected", lambda: from_afar)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda **_: None)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(session.ray, "get_runtime_context", lambda: connected)
    with session.ray_session(RayConfig(address="ray://10.0.0.1:10001")):
        assert watched == ([] if from_afar else ["10.0.0.1:6379"])


def test_no_thread_is_left(head):
    import threading

    host, port = head.getsockname()
    with headwatch.watched_head(f"{host}:{port}"):
        (watch,) = (t for t in threading.enumerate() if t.name == "headwatch")
    watch.join(30)
    assert not watch.is_alive()
    head.close()
