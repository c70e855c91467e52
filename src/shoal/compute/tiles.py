"""Exact mode's row tiles: how many rows share a matrix product, so that a row's bits do not depend on its company.

A floating-point product adds its terms in an order that the kernel chooses by shape, so the same row gets other last
bits among 32 rows than alone. Within one kernel the order is the same for every row. Measured (x86-64 with AVX-512,
torch 2.13, one thread): fp32 rows are bit-equal in products of 2 to 12 rows, but not with 1 row or from 16 on; in bf16
they are from 1 to 32. Small matrices (width 128) need 6 rows. Which tile holds is therefore tried, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowTile:
    """Up to `rows` rows in one product, filled up to `padded_rows` by repeating them in turn."""

    rows: int
    padded_rows: int

    def order(self, rows: int) -> list[int]:
        """Which row stands where, in a tile of `rows` rows: 0, 1, ..., rows - 1, 0, 1, ..."""
        return [index % rows for index in range(max(rows, self.padded_rows))]


ROW_TILES = (RowTile(8, 2), RowTile(8, 8), RowTile(4, 8), RowTile(1, 1))
"""Tried in this order; the first that holds is used.

- (8, 2): the cheapest. A lone row is doubled, which costs a tenth more than one row (a product reads its weights once
  for up to three rows).
- (8, 8): small matrices take other kernels below 6 rows.
- (4, 8): in a mixture of experts a row may be alone at its expert; twice in the tile, it never is.
- (1, 1): one row at a time cannot depend on company. The last resort, at the price of no batching.
"""

PROBE_ROWS = 8
_COMPANIES: tuple[Sequence[int], ...] = (range(8), (0, 3), (7, 1, 0), (2, 3, 4, 5, 7))


def first_that_holds(compute: Callable[[RowTile, Sequence[int]], Tensor]) -> RowTile:
    """The first of ROW_TILES under which rows get the same bits alone and in company.

    `compute(tile, chosen)` runs the chosen ones of PROBE_ROWS rows in tiles of that form and returns them in order.
    """
    return next(tile for tile in ROW_TILES if holds(tile, compute))


def holds(tile: RowTile, compute: Callable[[RowTile, Sequence[int]], Tensor]) -> bool:
    """Whether `tile` keeps the bits of a few rows the same alone and in four different companies."""
    if tile.rows == 1:
        return True
    alone = {index: compute(tile, [index])[0] for index in (0, 3, 7)}
    return all(
        torch.equal(row, alone[index])
        for company in _COMPANIES
        for index, row in zip(company, compute(tile, company), strict=True)
        if index in alone
    )
