"""Which hidden state a token's log-prob and value come from, and what must not change them."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import ARCHITECTURES
from tether.models.loading import load_causal_lm
from tether.models.policy import Policy, SeparateCritic
from tether.types import Rows, similar
from tiny import VOCABULARY, language_model, policy_of, ragged, ragged_rows

CPU = torch.device("cpu")


def sequences(rows: Rows):
    """(prompt ids, response ids) of each row."""
    for tokens, p, r in zip(
        rows.tokens.tolist(), rows.prompt_lengths.tolist(), rows.response_lengths.tolist(), strict=True
    ):
        yield tokens[:p], tokens[p : p + r]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_log_prob_entropy_and_value_of_a_token_come_from_the_prefix_before_it(architecture):
    rows, temperature = ragged_rows(), 0.7
    policy = policy_of(language_model(architecture))
    plain, head = policy.lm, policy.value_head
    out = policy(rows, temperature=temperature)
    for row, (prompt, response) in enumerate(sequences(rows)):
        for t, token in enumerate(response):
            prefix = torch.tensor([prompt + response[:t]])  # one forward pass a prefix, nothing shared, nothing padded
            log_p = torch.log_softmax(plain(input_ids=prefix).logits[0, -1] / temperature, -1)
            assert_close(out.logprobs[row, t], log_p[token], atol=1e-5, rtol=1e-5)
            assert_close(out.entropy[row, t], -(log_p.exp() * log_p).sum(), atol=1e-5, rtol=1e-5)
            hidden = plain.base_model(input_ids=prefix).last_hidden_state[0, -1]
            assert_close(out.values[row, t], head.weight[0] @ hidden + head.bias[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_outside_the_mask_are_zero():
    rows = ragged_rows()
    out = policy_of(language_model())(rows, temperature=1.0)
    for values in out:
        assert values[~rows.response_mask].eq(0).all()
        assert values[rows.response_mask].ne(0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_padding_changes_nothing_whatever_it_holds(architecture):
    rows = ragged_rows()
    policy = policy_of(language_model(architecture))
    generator = torch.Generator().manual_seed(7)
    wider = torch.randint(VOCABULARY, (len(rows), rows.tokens.shape[1] + 9), generator=generator)
    for row, length in enumerate((rows.prompt_lengths + rows.response_lengths).tolist()):
        wider[row, :length] = rows.tokens[row, :length]
    padded = dataclasses.replace(rows, tokens=wider)
    for got, want in zip(policy(padded, temperature=0.7), policy(rows, temperature=0.7), strict=True):
        assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it():
    rows = ragged_rows()
    policy = policy_of(language_model())
    together = policy(rows, temperature=1.0)
    for row in range(len(rows)):
        alone = policy(rows.select(torch.tensor([row])), temperature=1.0)
        for got, want in zip(alone, together, strict=True):
            assert_close(got[0], ragged(want, rows)[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("critic", [False, True])
def test_rows_that_go_through_in_groups_of_their_length_are_what_each_is_alone(critic):
    generator = torch.Generator().manual_seed(3)
    prompts, responses = torch.randint(1, 30, (2, 60), generator=generator).tolist()
    rows = ragged_rows(prompts, [2 * n for n in responses])
    assert len(similar(rows.prompt_lengths + rows.response_lengths)) > 1  # else this shows nothing
    policy = policy_of(language_model())
    if critic:
        policy = Policy(policy.model, SeparateCritic(policy.lm.base_model, policy.value_head, torch.float32))
    named = [p for p in policy.parameters() if p.requires_grad]

    def gradients(parts):
        for part in parts:
            out = policy(part, temperature=1.0)
            (out.logprobs.sin().sum() + out.values.square().sum()).backward()
        found = [p.grad for p in named]
        policy.zero_grad()
        return torch.cat([g.flatten() for g in found])

    with torch.no_grad():
        together = policy(rows, temperature=1.0)
        for row in range(len(rows)):
            alone = policy(rows.select(torch.tensor([row])), temperature=1.0)
            for got, want in zip(alone, together, strict=True):
                assert_close(ragged(want, rows)[row], got[0], atol=1e-5, rtol=0)
    one = gradients(rows.select(torch.tensor([row])) for row in range(len(rows)))
    assert float((gradients([rows]) - one).norm() / one.norm()) <= 1e-6


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200))
def test_groups_of_similar_length_hold_every_row_once_and_little_padding(lengths):
    groups = [index.tolist() for index in similar(torch.tensor(lengths))]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest, *rest = (lengths[i] for i in group)
        assert rest == sorted(rest, reverse=True)
        for rows, length in enumerate(rest, 1):  # a short one may join only where the group is still small
            assert length <= longest
            assert length >= longest * 7 / 8 or rows * longest < 1024


DROPOUTS = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "layerdrop": 0.1}
    | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("architecture", DROPOUTS)
@torch.no_grad()
def test_passes_in_train_mode_are_bit_identical_though_the_config_asks_for_dropout(architecture, tiny_model):
    directory = tiny_model(architecture, **DROPOUTS[architecture])
    model = load_causal_lm(str(directory), dtype=torch.float32, device=CPU).train()
    assert model.training
    tokens = ragged_rows().tokens
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
