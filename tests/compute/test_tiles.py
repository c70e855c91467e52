"""Row tiles: repeated rows, and a tile that does not keep the bits is found out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.compute.tiles import PROBE_ROWS, ROW_TILES, RowTile, first_that_holds, holds


def in_tiles(tile: RowTile, chosen: Sequence[int], noise: dict[int, float]) -> Tensor:
    """A product whose low bits depend on the number of rows it is computed with, as `noise` says."""
    out = []
    for start in range(0, len(chosen), tile.rows):
        rows = list(chosen[start : start + tile.rows])
        filled = len(tile.order(len(rows)))
        out += [row + noise.get(filled, 0.0) for row in rows]
    return torch.tensor(out).unsqueeze(1)


def test_a_tile_repeats_its_rows_in_turn_until_it_is_full() -> None:
    assert RowTile(8, 2).order(1) == [0, 0]
    assert RowTile(8, 2).order(5) == [0, 1, 2, 3, 4]
    assert RowTile(4, 8).order(3) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_the_cheapest_tile_that_keeps_the_bits_is_chosen() -> None:
    lone_rows_differ = {1: 0.5}
    assert first_that_holds(lambda tile, rows: in_tiles(tile, rows, lone_rows_differ)) == RowTile(8, 2)
    few_rows_differ = {1: 0.5, 2: 0.5, 3: 0.5, 5: 0.25}
    assert first_that_holds(lambda tile, rows: in_tiles(tile, rows, few_rows_differ)) == RowTile(8, 8)


def test_a_tile_is_refused_when_company_reaches_a_row() -> None:
    def mixing(tile: RowTile, chosen: Sequence[int]) -> Tensor:
        return torch.tensor([[row + 0.001 * len(chosen)] for row in chosen])

    assert not any(holds(tile, mixing) for tile in ROW_TILES[:-1])
    assert first_that_holds(mixing) == ROW_TILES[-1]


def test_a_real_product_of_lone_rows_is_told_from_one_of_doubled_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(512, 1024, generator=generator), torch.randn(PROBE_ROWS, 1024, generator=generator)

    def product(tile: RowTile, chosen: Sequence[int]) -> Tensor:
        parts = rows[list(chosen)].split(tile.rows)
        return torch.cat(
            [torch.nn.functional.linear(part[tile.order(len(part))], weight)[: len(part)] for part in parts]
        )

    found = first_that_holds(product)
    together = product(found, range(PROBE_ROWS))
    assert all(torch.equal(product(found, [row])[0], together[row]) for row in range(PROBE_ROWS))
