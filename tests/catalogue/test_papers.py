"""The table of papers: complete, tidy, and read only when asked for."""

from __future__ import annotations

import re

import pytest

from foveate.catalogue.papers import TIERS, Paper, families, paper, papers
from foveate.catalogue.registry import rows

DOMAINS = {"text", "image", "video", "audio", "multimodal", "3d", "timeseries", "graph", "rl", "other"}


def test_every_field_is_in_order() -> None:
    assert len(papers()) == 392
    for found in papers().values():
        assert found.tier in TIERS, found
        assert found.domain in DOMAINS, found
        assert found.title and found.works_when and found.family, found
        assert found.works_when == found.works_when.strip() and found.works_when.endswith("."), found


def test_ids_are_well_formed_and_no_two_papers_share_one() -> None:
    ids = [found.id for found in papers().values() if found.id]
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}|10\.\d{4,}/\S+", one) for one in ids)
    assert len(set(ids)) == len(ids) > 350


def test_papers_that_mechanisms_keep_have_an_id_and_authors_where_they_are_known() -> None:
    named = {found for row in rows() for found in row.papers}
    assert len(named) > 50
    assert all(found.url for found in named)
    assert sum(not found.authors for found in named) < 0.1 * len(named)


def test_url() -> None:
    assert paper("StreamingLLM").url == "https://arxiv.org/abs/2309.17453"
    kinds = {"authors": "", "title": "", "key": "", "tier": "", "family": "", "domain": "", "works_when": ""}
    assert Paper(id="10.1145/1.2", **kinds).url == "https://doi.org/10.1145/1.2"
    assert Paper(id="", **kinds).url == ""


def test_an_unknown_key_is_answered_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean.*StreamingLLM"):
        paper("streaming_llm")
    with pytest.raises(ValueError, match="no paper has the key 'qqqq' "):
        paper("qqqq")


def test_families_are_in_the_order_of_the_table() -> None:
    assert families()[0] == "exact-io"
    assert len(set(families())) == len(families()) == 18
