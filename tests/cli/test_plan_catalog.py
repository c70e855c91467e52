"""`shoal plan models` and `shoal plan devices`, as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cli.main import run


def test_a_model_of_the_catalog_shows_how_its_parameters_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "models", "bloom-176b", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert sum(found["parts"].values()) == found["parameters"] == 176_247_271_424
    assert found["bytes_16_bit"] == pytest.approx(352e9, rel=0.002)


def test_the_list_has_every_model_and_the_other_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "models", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) >= 60
    assert run(["plan", "devices"]) == 0
    assert "RTX-4090" in capsys.readouterr().out


def test_a_config_file_and_its_directory_are_read_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    config |= {"intermediate_size": 16, "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))

    outputs = []
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        assert run(["plan", "models", name, "--json"]) == 0
        outputs.append(capsys.readouterr().out)

    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("name", ["llama-9", "missing.json", "layers=1", "layers=1,hidden=8,heads=3,ffn=4,vocab=9"])
def test_a_model_that_cannot_be_read_is_a_usage_error_with_the_forms(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "models", name]) == 2
    assert "hint:" in capsys.readouterr().err


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from shoal.cli.main import run; run(['plan', 'models', 'llama-2-7b']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers', 'cryptography')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
