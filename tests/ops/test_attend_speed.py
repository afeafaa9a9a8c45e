"""`regard.attend` costs what torch's attention costs."""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import regard


def medians(works, repeats):
    """Median seconds of each work, taken in turns, so that a slower moment of the machine meets all of them."""
    for work in works:
        work()
    times = [[] for _ in works]
    for turn in range(repeats):
        # who goes first changes: the first of a turn finds colder caches
        for place in (range(len(works)), reversed(range(len(works))))[turn % 2]:
            start = time.perf_counter()
            works[place]()
            times[place].append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def test_the_plain_call_adds_at_most_five_microseconds():
    q = torch.randn(1, 1, 4, 16)
    with torch.no_grad():
        ours, torchs = medians([lambda: regard.attend(q, q, q), lambda: F.scaled_dot_product_attention(q, q, q)], 5000)
    assert ours - torchs <= 5e-6


@pytest.mark.slow
def test_attend_against_torch(record):
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1024, 4096):
            q, k, v = (torch.randn(1, 8, n, 64, dtype=dtype, requires_grad=True) for _ in range(3))
            do = torch.randn(1, 8, n, 64, dtype=dtype)
            forward = [
                lambda q=q, k=k, v=v: regard.attend(q, k, v, is_causal=True),
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            ]
            both = [lambda work=work, do=do: work().backward(do) for work in forward]
            for kind, works in (("forward", forward), ("forward + backward", both)):
                ours, torchs = medians(works, 40 if n == 1024 else 12)
                figures[f"{str(dtype).partition('.')[2]} n={n} {kind}"] = {
                    "regard_ms": round(ours * 1e3, 3), "torch_ms": round(torchs * 1e3, 3), "ratio": round(ours / torchs, 4)
                }  # fmt: skip
    record(figures)
    assert all(f["ratio"] <= 1.03 for f in figures.values()), figures
