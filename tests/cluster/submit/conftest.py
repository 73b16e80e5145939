"""Shared by the tests of `zsplg submit`: a dashboard, a user without patience, what was told."""

import pytest

from tests.cluster.submit.dashboard import Dashboard, serving
from zsplg_ray.cluster.submit import follow

QUICK = follow.Pace(look=0.02, patience=0.0, again=0.02, waits=0.03, lost=60)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """In a folder of its own, with no token anywhere, and without patience."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MODE", "TOKEN", "TOKEN_PATH"):
        monkeypatch.delenv(f"RAY_AUTH_{name}", raising=False)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(follow, "PACE", QUICK)


@pytest.fixture
def fake():
    with serving(Dashboard()) as made:
        yield made


@pytest.fixture
def told(capsys, caplog):
    """(stdout, all that was said beside it) since the last call."""

    def look() -> tuple[str, str]:
        out, err = capsys.readouterr()
        said = caplog.text
        caplog.clear()
        return out, said + err

    return look
