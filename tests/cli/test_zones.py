"""Trust zones and labels on the command line: what is wrong is said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cli.main import run
from shoal.net.home import Home


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command finds anything of the person who runs the tests."""
    for name, folder in (("XDG_STATE_HOME", "state"), ("XDG_DATA_HOME", "data")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("SHOAL_SWARM_DIR", raising=False)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--zones", "first=hq"], "Cannot read 'first=hq' in the policy"),
        (["--label", "server-0"], "Cannot read the label 'server-0'"),
        (["--label", "server-9=hq"], "There is no node 'server-9' to be labelled"),
    ],
)
def test_up_refuses_a_zone_or_a_label_that_cannot_be(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["up", *args]) == 2
    assert told in capsys.readouterr().err


def test_a_gateway_gives_itself_no_labels_but_on_the_admins_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(__file__).parents[2] / "src" / "shoal" / "assets" / "demo"
    elsewhere = Home(tmp_path / "data" / "shoal" / "swarm")
    elsewhere.path.mkdir(parents=True)
    assert run(["gateway", "--serve", str(model), "--label", "hq"]) == 2
    assert "Labels are given by the swarm's admin" in capsys.readouterr().err
