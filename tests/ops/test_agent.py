from __future__ import annotations

import pytest
import torch

from regard import Causal, Documents, KeyValid, OptionError, ShapeError, SlidingWindow, Unsupported, agent_attention
from regard.engines.scan import linear_scan
from tests.oracles import attention, normal


def tensors(n=7, m=11, agents=3):
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6), (2, 4, agents, 5))


def eye(m=11):
    return torch.eye(m, dtype=torch.float64).expand(2, 2, m, m)


def test_it_is_the_product_of_two_softmax_matrices():
    q, k, v, agents = tensors()
    bias_ak, bias_qa = normal((4, 3, 11), (2, 4, 7, 3), seed=1)
    out = agent_attention(q, k, v, agents, bias_ak=bias_ak, bias_qa=bias_qa, scale=0.7)
    gathered, _ = attention(agents, k, v, bias=bias_ak, scale=0.7)
    expected, _ = attention(q, agents, gathered, bias=bias_qa, scale=0.7)
    torch.testing.assert_close(out, expected)
    plain, _ = attention(q, agents, attention(agents, k, v)[0])
    torch.testing.assert_close(agent_attention(q, k, v, agents), plain)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_rows_of_the_implied_weights_sum_to_one_and_their_rank_is_the_number_of_agents(count):
    q, k, _, agents = tensors(n=9, agents=count)
    weights = agent_attention(q, k, eye(), agents)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    # fewer agents than the width of a head, so that their scores are free of each other, or more
    assert (torch.linalg.matrix_rank(weights) == count).all()


def test_one_agent_gives_every_query_what_it_gathered():
    q, k, v, agents = tensors(agents=1)
    expected, _ = attention(agents, k, v)
    torch.testing.assert_close(agent_attention(q, k, v, agents), expected.expand(2, 4, 7, 6))


def test_it_is_linear_attention_with_softmax_features_and_no_normaliser():
    q, k, v, agents = tensors()
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    features_q = torch.softmax(q @ agents.transpose(-1, -2) * 5**-0.5, -1)
    features_k = torch.softmax(agents @ k.transpose(-1, -2) * 5**-0.5, -1).transpose(-1, -2)
    expected, _ = linear_scan(features_q, features_k, v, is_causal=False)
    torch.testing.assert_close(agent_attention(q, k, v, agents), expected)


def test_keys_as_agents_that_gather_themselves_alone_give_softmax_attention():
    q, k, v, _ = tensors()
    own = torch.full((11, 11), -1e4, dtype=torch.float64).fill_diagonal_(0)
    out = agent_attention(q, k, v, k.repeat_interleave(2, 1), bias_ak=own)
    torch.testing.assert_close(out, attention(q, k, v)[0])


def test_hidden_keys_are_as_good_as_absent():
    q, k, v, agents = tensors()
    valid = (torch.arange(11) < 8).expand(2, 11)
    out = agent_attention(q, k, v, agents, pattern=KeyValid().bind(key_valid=valid))
    torch.testing.assert_close(out, agent_attention(q, k[:, :, :8], v[:, :, :8], agents))


def test_an_agent_behind_minus_infinity_is_as_good_as_absent():
    q, k, v, agents = tensors()
    bias = torch.zeros(7, 3, dtype=torch.float64)
    bias[:, 1] = float("-inf")
    out = agent_attention(q, k, v, agents, bias_qa=bias)
    torch.testing.assert_close(out, agent_attention(q, k, v, agents[:, :, [0, 2]]))
    bias[4] = float("-inf")
    assert (agent_attention(q, k, v, agents, bias_qa=bias)[:, :, 4] == 0).all()


def test_gradients_are_those_of_finite_differences():
    given = normal((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (1, 2, 2, 3), (2, 2, 5), (2, 4, 2))
    given = [t.requires_grad_() for t in given]

    def run(q, k, v, agents, bias_ak, bias_qa):
        return agent_attention(q, k, v, agents, bias_ak=bias_ak, bias_qa=bias_qa)

    assert torch.autograd.gradcheck(run, given)


def test_what_it_cannot_do_is_refused():
    q, k, v, agents = tensors(11, 11)
    with pytest.raises(Unsupported, match="agent is not causal"):
        agent_attention(q, k, v, agents, is_causal=True)
    for pattern in (Causal(), SlidingWindow(3), Documents().bind(doc=torch.zeros(2, 11, dtype=torch.long))):
        with pytest.raises(Unsupported):
            agent_attention(q, k, v, agents, pattern=pattern)
    with pytest.raises(ShapeError, match=r"axis h \(query heads\) of agents is 3"):
        agent_attention(q, k, v, agents[:, :3])
    with pytest.raises(ShapeError, match=r"axis d \(key width\) of agents"):
        agent_attention(q, k, v, agents[..., :4])
    with pytest.raises((ShapeError, OptionError)):
        agent_attention(q, k, v, agents, bias_ak=torch.zeros(4, 7, 3, dtype=torch.float64))
