"""The heads of implicit Q-learning: against the whole [N, V] in float64, their targets, and what they hold."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tether.errors import ModelError
from tether.models.ilql import ILQLHeads, Steering, load_steering
from tiny import randomize


def heads_and_hidden(width=6, vocabulary=11, n=7):
    heads = ILQLHeads(width, vocabulary)
    for i, (name, part) in enumerate(heads.named_children()):
        randomize(part, seed=i)
        assert name
    return heads, torch.randn(n, width, generator=torch.Generator().manual_seed(9))


def whole(head, hidden):
    """[N, V] in float64, off the bare weights."""
    first, last = ((m.weight.detach().double(), m.bias.detach().double()) for m in (head.first, head.last))
    features = (hidden.double() @ first[0].T + first[1]).clamp(min=0)
    return features @ last[0].T + last[1]


def test_of_each_token_the_heads_say_what_their_whole_outputs_do():
    heads, hidden = heads_and_hidden()
    tokens = torch.tensor([3, 3, 0, 10, 5, 7, 1])
    got = heads(hidden, tokens)
    at = tokens[:, None]
    assert_close(got.values.double(), whole(heads.value, hidden)[:, 0])
    for name in ("q1", "q2"):
        q = whole(getattr(heads, name), hidden)
        assert_close(getattr(got, name).double(), q.gather(1, at)[:, 0])
        assert_close(getattr(got, f"{name}_logprobs").double(), q.log_softmax(1).gather(1, at)[:, 0])
    target = torch.minimum(whole(heads.target_q1, hidden), whole(heads.target_q2, hidden))
    assert_close(got.target_q.double(), target.gather(1, at)[:, 0])
    assert heads(hidden, tokens, cql=False).q1_logprobs.eq(0).all()


def test_targets_get_no_gradient():
    heads, hidden = heads_and_hidden()
    sum(x.sum() for x in heads(hidden, torch.arange(7)) if x.requires_grad).backward()
    for name, p in heads.named_parameters():
        assert (p.grad is None) == name.startswith("target"), name
    assert {name.split(".")[1] for name, _ in heads.trained()} == {"value", "q1", "q2"}


def test_targets_are_the_polyak_average():
    heads, _ = heads_and_hidden()
    before = copy.deepcopy(heads)
    heads.sync(0.1)
    heads.sync(0.1)
    for name in ("q1", "q2"):
        for slow, was, fast in zip(
            getattr(heads, f"target_{name}").parameters(), getattr(before, f"target_{name}").parameters(),
            getattr(heads, name).parameters(), strict=True,
        ):  # fmt: skip
            assert_close(slow, 0.19 * fast + 0.81 * was)  # α = .1 twice: .1 + .9·.1
    heads.sync(1.0)
    assert torch.equal(heads.target_q2.last.weight, heads.q2.last.weight)


def test_new_heads_say_0_and_their_targets_agree_with_them():
    heads = ILQLHeads(6, 11)
    found = heads(torch.randn(3, 6), torch.tensor([1, 2, 3]))
    for x in (found.values, found.q1, found.q2, found.target_q):
        assert torch.equal(x, torch.zeros(3))
    assert not torch.equal(heads.q1.first.weight, heads.q2.first.weight)  # or they would stay one and the same
    assert torch.equal(heads.target_q1.first.weight, heads.q1.first.weight)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


def test_no_tensor_of_all_tokens_by_the_whole_vocabulary_is_made():
    n, vocabulary = 4096, 16384
    heads, hidden = ILQLHeads(4, vocabulary), torch.randn(n, 4, requires_grad=True)
    with Largest() as largest:
        found = heads(hidden, torch.randint(vocabulary, (n,)))
        (found.q1.sum() + found.q1_logprobs.sum() + found.values.sum()).backward()
    assert 0 < largest.bytes <= 4 * n * vocabulary / 16


# ---------------------------------------------------------------- where answers are sampled


@pytest.mark.parametrize("top_k", [0, 3, 11, 50])
def test_steering_adds_the_smaller_target_q_to_the_likeliest_tokens(top_k):
    heads, hidden = heads_and_hidden()
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    got = Steering(heads.state_dict(), strength=2.0, top_k=top_k)(logits, hidden)
    q = torch.minimum(whole(heads.target_q1, hidden), whole(heads.target_q2, hidden))
    want = logits.double() + 2 * q
    if top_k == 3:
        least = logits.sort(descending=True).values[:, 2:3]
        want = torch.where(logits >= least, want, -torch.inf)
    assert_close(got, want.float())


def test_without_strength_the_logits_are_left_alone():
    heads, hidden = heads_and_hidden()
    logits = torch.randn(7, 11)
    assert torch.equal(Steering(heads.state_dict(), strength=0.0, top_k=3)(logits, hidden), logits)


def test_saved_heads_steer_as_the_trained_ones(tmp_path):
    heads, hidden = heads_and_hidden()
    heads.save(tmp_path / "ilql", strength=3.0, top_k=4)
    where = {"width": 6, "vocabulary": 11, "device": torch.device("cpu")}
    logits = torch.randn(7, 11)
    want = Steering(heads.state_dict(), strength=3.0, top_k=4)(logits, hidden)
    assert torch.equal(load_steering(str(tmp_path), **where)(logits, hidden), want)
    assert load_steering(str(tmp_path), strength=0.5, **where).strength == 0.5
    assert load_steering(str(tmp_path / "ilql"), **where) is None  # no heads beside it
    with pytest.raises(ModelError, match=r"heads of shapes .*\[11, 12\].* needs .*\[12, 12\]"):
        load_steering(str(tmp_path), **where | {"vocabulary": 12})


@pytest.mark.parametrize(
    "damage",
    ["not json", '{"strength": 1}', '{"strength": -5, "top_k": 3}', '{"strength": NaN, "top_k": 3}', "", None, "head"],
)
def test_heads_that_cannot_be_read_are_never_left_out_silently(tmp_path, damage):
    heads, _ = heads_and_hidden()
    heads.save(tmp_path / "ilql", strength=3.0, top_k=4)
    file = tmp_path / "ilql" / "heads.safetensors"
    if damage is None:
        file.write_bytes(b"x" * 40)
    elif damage == "head":
        save_file({name: x for name, x in load_file(file).items() if name != "target_q1.first.bias"}, file)
    elif not damage:
        (tmp_path / "ilql" / "ilql.json").unlink()
    else:
        (tmp_path / "ilql" / "ilql.json").write_text(damage)
    with pytest.raises(ModelError, match=r"without what Q-learning learned\. Copy the whole directory again"):
        load_steering(str(tmp_path), width=6, vocabulary=11, device=torch.device("cpu"))
