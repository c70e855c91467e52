"""A tiny random Llama of six blocks, on disk and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from shoal.compute.families import random_model


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return random_model("llama", seed=3)


@pytest.fixture(scope="session")
def model_dir(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path
