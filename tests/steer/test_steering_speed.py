"""What steering and recording cost, and what a small cache saves, on a processor."""

import statistics
import time

import pytest
import torch
import transformers as hf

from regard import Recency, SnapKV, recording, steer
from regard import record as record_once
from regard.bench.machine import peak_mib


def model(layers, dim, heads, groups, hidden):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=388, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, max_position_embeddings=16384,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def in_turns(calls, rounds):
    """Median processor seconds of each, called in turns."""
    taken = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, taken, strict=True):
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
    return [statistics.median(times) for times in taken]


@torch.no_grad()
def decoder(net, ids, *interventions):
    """A session with a filled cache, and a function that decodes one token in it."""
    session = steer(net, *interventions)
    session.__enter__()
    out = net(ids, use_cache=True, logits_to_keep=1)
    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values

    @torch.no_grad()
    def step():
        net(token, past_key_values=cache)

    for _ in range(3):
        step()
    return session, step


@pytest.mark.slow
def test_an_eighth_of_the_cache_decodes_twice_as_fast(record):
    net = model(4, 512, 8, 8, 1376)
    ids = torch.randint(0, 380, (1, 8192), generator=torch.Generator().manual_seed(0))
    times, held = {}, {}
    for name, ways in (("full", ()), ("snapkv", (SnapKV(budget=1024),)), ("recency", (Recency(budget=1024),))):
        session, step = decoder(net, ids, *ways)
        times[name] = in_turns([step], 30)[0] * 1e3
        held[name] = sum(row["bytes"] for row in session.report())
        session.__exit__(None, None, None)
    full_bytes = 4 * 2 * 8 * 64 * 4 * (8192 + 33)
    assert held["snapkv"] == 4 * 2 * 8 * 64 * 4 * (1024 + 33)
    record({"model": "4 layers, width 512, 8 heads, float32", "context": 8192, "decode_ms": times, "times_as_fast":
            times["full"] / times["snapkv"], "cache_bytes": {**held, "full": full_bytes}})  # fmt: skip
    assert times["full"] >= 2 * times["snapkv"]


@pytest.mark.slow
def test_recording_sums_of_8192_tokens(record):
    net = model(3, 128, 4, 2, 320)
    ids = torch.randint(0, 380, (1, 8192), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "use_cache": False}

    @torch.no_grad()
    def plain():
        net(**given)

    def recorded():
        record_once(net, given, reduce=("column_sum", "entropy"))

    plain(), recorded()
    seconds = in_turns([plain, recorded], 7)
    peaks = [peak_mib(plain), peak_mib(recorded)]
    ratios = {"time": seconds[1] / seconds[0], "peak": None if None in peaks else peaks[1] / peaks[0]}
    record({"model": "3 layers, width 128, 4 heads, float32", "seconds": seconds, "peak_mib": peaks, "ratios": ratios})
    assert ratios["peak"] is None or ratios["peak"] < 1.3


def test_an_empty_session_costs_nothing_and_one_that_reads_little_costs_little():
    net = model(2, 64, 2, 2, 128)
    ids = torch.randint(0, 380, (1, 256), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def plain():
        net(ids, use_cache=False)

    plain()
    with steer(net):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert net.config._attn_implementation == "sdpa"
    with recording(net, sites=("resid_post",), layers=(1,)):
        seconds = in_turns([plain], 30)
    without = in_turns([plain], 30)
    # hooks alone, without the attention function
    assert seconds[0] < 2 * without[0]
