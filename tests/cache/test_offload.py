"""What lies outside of the device comes back as it was, and every byte is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.cache.offload import Offloaded


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_appended_comes_back(on_disk: bool, tmp_path: Path) -> None:
    store = Offloaded(tmp_path / "pages" if on_disk else None)
    k, v = torch.randn(2, 3, 1001, 5), torch.randn(2, 3, 1001, 4)
    at = 0
    for count in (300, 1, 0, 450, 250):
        store.append(k[:, :, at : at + count], v[:, :, at : at + count])
        at += count
    assert store.count == 1001
    assert store.written == (k.nbytes + v.nbytes)
    index = torch.randint(1001, (2, 3, 17))
    for got, want in zip(store.take(index), (k, v), strict=True):
        assert torch.equal(got, want.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, want.shape[3])))
    assert store.read == 2 * 3 * 17 * (5 + 4) * 4
    one = store.listed(*(torch.tensor(x) for x in ([1], [2], [999])))
    assert torch.equal(one[0][0], k[1, 2, 999])
    store.select(torch.tensor([1, 1, 0]))
    assert torch.equal(store.tensors[1], v[[1, 1, 0]])
    if on_disk:
        assert not any((tmp_path / "pages").iterdir())  # the files go with the object
