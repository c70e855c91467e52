"""A server reads and holds its own blocks and nothing else: `shoal bench load` on a model of 150 MB."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.bench.load import MODEL_SHAPE, run, write_model

pytestmark = pytest.mark.slow

SHAPE = MODEL_SHAPE | {"hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 4, "vocab_size": 8_192}


def test_bytes_read_and_memory_are_those_of_the_hosted_blocks(tmp_path: Path) -> None:
    write_model(tmp_path, SHAPE)

    results = list(run(tmp_path))

    assert [result.blocks for result in results] == ["0:1", "0:2", "0:4"]
    for result in results:
        assert result.bytes_read == result.block_bytes
        # The kernel's count has the headers of the opened shards and the index in it.
        assert result.block_bytes < result.kernel_bytes_read < 1.02 * result.block_bytes + 1e6
        assert result.base_bytes > 100e6
        # A few megabytes of the allocator's slack are allowed; a second copy of the weights is not.
        assert result.resident_bytes - result.base_bytes < 1.1 * result.block_bytes + 8e6
        assert result.peak_bytes - result.base_bytes < 1.1 * result.block_bytes + 16e6
    assert results[2].block_bytes == 2 * results[1].block_bytes == 4 * results[0].block_bytes
