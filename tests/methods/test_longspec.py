"""LongSpec: trees against dense masks, the draft's layer written out, and greedy texts token for token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.support.decoders import gated
from tests.support.llama_by_hand import turned
from tests.support.small_models import small_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.cache.tree import tree_attention
from foveate.catalogue import tiers
from foveate.methods.longspec_draft import Draft, Grown, anchor_offset, draft_loss

pytest.importorskip("transformers")


def a_tree(nodes: int) -> Tensor:
    """Whom each node sees, where node i hangs on a random earlier one."""
    sees = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        sees[node] |= sees[torch.randint(node, ()).item()]
    return sees


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Heads in, heads out: (H, N, D), keys repeated."""
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.paper("LongSpec", "definition")
@pytest.mark.paper("LongSpec", "works_when")
@pytest.mark.parametrize(("text", "nodes"), [(37, 9), (1, 5), (130, 1)])
def test_a_tree_behind_a_text_is_attention_under_one_mask(text: int, nodes: int) -> None:
    """Any ancestor mask, the last nodes alone or all; gradients too."""
    q, k, v = (
        torch.randn(2, heads, count, 6, dtype=torch.float64, requires_grad=True)
        for heads, count in ((4, nodes), (2, text + nodes), (2, text + nodes))
    )
    ancestors = a_tree(nodes) if nodes != 5 else torch.rand(5, 5) < 0.4  # not only trees
    mask = torch.cat([torch.ones(nodes, text, dtype=torch.bool), ancestors], 1)
    last = (nodes + 1) // 2
    got = tree_attention(
        q[:, :, -last:], k[:, :, :text], v[:, :, :text], k[:, :, text:], v[:, :, text:], ancestors[-last:]
    )
    want = dense(q[:, :, -last:], k, v, mask[-last:])
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    towards = torch.randn_like(want)
    for mine, other in zip(*(torch.autograd.grad(out, (q, k, v), towards) for out in (got, want)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-10)


def turn(x: Tensor, at: Tensor) -> Tensor:
    return turned(x, at[0])


def a_draft() -> Draft:
    draft = Draft(16, 4, 2, 6, 20, window=3, eps=1e-5).double()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.4)
    return draft


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm.weight


def heads_of(x: Tensor, layer: nn.Module, count: int) -> Tensor:
    return (x @ layer.weight.T + layer.bias).view(*x.shape[:2], count, -1).transpose(1, 2)


def layer_by_hand(
    draft: Draft, x: Tensor, at: Tensor, seen: Tensor, target: tuple[Tensor, Tensor], target_seen: Tensor
) -> Tensor:
    y = rms(x, draft.norm)
    q, k = turned(heads_of(y, draft.to_q, 4), at), turned(heads_of(y, draft.to_k, 2), at)
    out = dense(q, k, heads_of(y, draft.to_v, 2), seen)
    x = x + out.transpose(1, 2).flatten(2) @ draft.to_out.weight.T
    q = turned(heads_of(rms(x, draft.cross_norm), draft.cross_q, 4), at)
    out = dense(q, *target, target_seen).nan_to_num(0.0)  # rows that see nothing
    x = x + out.transpose(1, 2).flatten(2) @ draft.cross_out.weight.T
    return x + gated(draft.channels, rms(x, draft.channels_norm))


@pytest.mark.paper("LongSpec", "definition")
@pytest.mark.parametrize("lag", [1, 4])
def test_the_drafts_layer_in_training(lag: int) -> None:
    """The last three tokens and itself; the target's keys ``lag`` tokens back; positions with anchors and an offset."""
    draft, x, at = a_draft(), torch.randn(2, 11, 16, dtype=torch.float64), anchor_offset(11, 100)
    target = (torch.randn(2, 2, 11, 6, dtype=torch.float64), torch.randn(2, 2, 11, 6, dtype=torch.float64))
    apart = torch.arange(11)[:, None] - torch.arange(11)
    want = layer_by_hand(draft, x, at, (apart >= 0) & (apart <= 3), target, apart >= lag)
    got = draft(x, at[None], turn, target, lag)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    towards, wanted = torch.randn_like(want), [*draft.parameters()]
    pairs = zip(*(torch.autograd.grad(out, wanted, towards) for out in (got, want)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.paper("LongSpec", "definition")
def test_the_drafts_layer_on_a_tree_behind_its_window() -> None:
    """Nodes see their ancestors, what is left of the window at their depth, and all of the target's keys."""
    draft, text, sees = a_draft(), 90, torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    x = torch.randn(1, text + 4, 16, dtype=torch.float64)
    at = torch.cat([torch.arange(text), text + torch.tensor([0, 1, 1, 2])])
    target = (torch.randn(1, 2, text, 6, dtype=torch.float64), torch.randn(1, 2, text, 6, dtype=torch.float64))
    near = at[text:, None] - torch.arange(text) <= 3
    mask = torch.zeros(text + 4, text + 4, dtype=torch.bool)
    mask[text:] = torch.cat([near, sees], 1)
    mask[:text, 0] = True
    want = layer_by_hand(draft, x, at, mask, target, torch.ones(text + 4, text, dtype=torch.bool))[:, text:]
    with torch.no_grad():
        kept = draft.init_state()
        for token in range(text):
            kept = kept.append(*draft.keys(x[:, token : token + 1], at[None, token : token + 1], turn)).trimmed()
        tree = draft.keys(x[:, text:], at[None, text:], turn)
        got = draft.grow(x[:, text + 2 :], at[None, text + 2 :], turn, kept, Grown(*tree), sees[2:], target)
    torch.testing.assert_close(got, want[:, 2:], atol=1e-10, rtol=1e-10)
    assert kept.k.shape[2] <= 3 + 1 + 32 < text


@pytest.mark.paper("LongSpec", "definition")
def test_anchors_stay_and_the_rest_is_moved() -> None:
    assert anchor_offset(6, 1000).tolist() == [0, 1, 2, 3, 1004, 1005]
    assert anchor_offset(3, 7, anchors=1).tolist() == [0, 8, 9]
    assert anchor_offset(2, 7).tolist() == [0, 1]


PROMPTS = torch.tensor([[5, 9, 2, 31, 17, 44, 3, 8, 21, 30, 6, 12], [0, 0, 0, 0, 7, 7, 1, 40, 33, 2, 19, 4]])


def greedy(model: nn.Module, tokens: Tensor, count: int, **options: object) -> Tensor:
    mask = (tokens != 0).long()
    return model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)


@pytest.mark.paper("LongSpec", "works_when")
@pytest.mark.parametrize(
    ("name", "tree"), [("llama", (4, 5, 3)), ("llama", (1,)), ("qwen3", (2, 2)), ("gpt2", (3, 2, 2, 2))], ids=str
)
def test_greedy_texts_stay_token_for_token(name: str, tree: tuple[int, ...]) -> None:
    """Whatever an untrained draft proposes; a padded batch; ends that come early, in the middle of an accepted path."""
    model = small_model(name)
    plain = greedy(model, PROMPTS, 11, min_new_tokens=11)
    early = greedy(model, PROMPTS, 11, eos_token_id=int(plain[0, 18]), pad_token_id=0)
    change = tiers.row("longspec").make(window=5, tree=tree).install(model)
    try:
        assert torch.equal(greedy(model, PROMPTS, 11, min_new_tokens=11), plain)
        assert torch.equal(greedy(model, PROMPTS, 11, eos_token_id=int(plain[0, 18]), pad_token_id=0), early)
    finally:
        change.undo()
    assert torch.equal(greedy(model, PROMPTS, 11, min_new_tokens=11), plain)


def predictable() -> nn.Module:
    """A model that goes by a token itself more than by those before it: its texts can be learned."""
    model = copy.deepcopy(small_model("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
    return model


def trained(model: nn.Module) -> tuple[Draft, list[float]]:
    """A draft that has learned from texts that the model wrote."""
    draft = Draft.of(model, window=8)
    texts = greedy(model, torch.randint(1, 50, (100, 2)), 8, min_new_tokens=8)
    optimizer, losses = torch.optim.Adam(draft.parameters(), lr=1e-2), []
    for step in range(40):
        loss = draft_loss(model, draft, texts, lag=1 + step % 4, offset=37 * (step % 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return draft, losses


@pytest.mark.paper("LongSpec", "works_when")
def test_a_trained_draft_is_right_more_often_and_keeps_a_window() -> None:
    """Texts stay what they are, in fewer calls of the model than tokens; the draft's cache does not grow with them."""
    model = predictable()
    draft, losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = greedy(model, PROMPTS, 45, min_new_tokens=45)
    method = tiers.row("longspec").make(draft=draft, tree=(3, 3, 3))
    sizes = []
    keys = draft.grow

    def seen(*args: object) -> Tensor:
        sizes.append(args[3].k.shape[2])
        return keys(*args)

    draft.grow = seen
    change = method.install(model)
    try:
        assert torch.equal(greedy(model, PROMPTS, 45, min_new_tokens=45), plain)
    finally:
        change.undo()
    assert sum(method.accepted) == 2 * 44  # the first token of each text comes with its prompt
    assert max(method.accepted) > 1
    assert len(method.accepted) < 0.95 * 2 * 44
    assert max(sizes) <= 8 + 1 + 32 < 12 + 45


@pytest.mark.paper("LongSpec", "definition")
def test_the_loss_is_that_of_the_next_tokens_with_the_targets_embeddings_and_output_layer() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (2, 9))
    draft = Draft.of(model, window=4)
    cache = model(tokens, use_cache=True).past_key_values.layers[-1]
    x = model.model.embed_tokens.weight[tokens]
    found = draft(x, torch.arange(9)[None], turn, (cache.keys, cache.values), 2) @ model.lm_head.weight.T
    want = cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    got = draft_loss(model, draft, tokens, lag=2)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_refusals_in_words() -> None:
    row = tiers.row("longspec")
    with pytest.raises(ValueError, match="at least 1"):
        row.make(tree=(2, 0))
    with pytest.raises(TypeError, match="draft is a Draft"):
        row.make(draft=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 or more"):
        anchor_offset(3, -1)
    model = small_model("gemma3")
    change = row.make(window=4, tree=(2,)).install(model)
    try:
        with pytest.raises(NotImplementedError, match="layers that see everything"):
            greedy(model, PROMPTS[:1], 3)
        with pytest.raises(ValueError, match="do_sample=False"):
            model.generate(PROMPTS[:1], do_sample=True, max_new_tokens=3)
    finally:
        change.undo()
