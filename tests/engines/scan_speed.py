"""What the scan and the delta rule cost beside what torch users write: one thread, process CPU time, JSON on stdout.

Run with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184: fresh pages cost more than the arithmetic. "loop" as
argument measures the loop over chunks alone, which pays for fresh pages most of all.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F

from regard.engines import native
from regard.engines.delta import delta_rule
from regard.engines.scan import linear_scan

HEADS, WIDTH, CHUNK = 8, 64, 64
# products of chunk x width x width: three and three halves going forward and back, one to replay the states
PRODUCTS = 10.5


def parallel_prefix(q, k, v, g=None):
    """Chunks in one batch of products; the states of all chunks by a cumulated sum, or a table of chunk pairs."""
    batch, heads, n, _ = q.shape
    chunks = n // CHUNK
    q, k, v = (x.view(batch, heads, chunks, CHUNK, -1) for x in (q, k, v))
    own = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    if g is None:
        added = k.transpose(-1, -2) @ v
        # a half-precision sum over chunks would be another function
        wide = added.to(torch.promote_types(q.dtype, torch.float32))
        before = (wide.cumsum(2) - wide).to(q.dtype)
        return ((q @ k.transpose(-1, -2) * own) @ v + q @ before).view(batch, heads, n, -1)
    c = g.view(batch, heads, chunks, CHUNK).cumsum(-1)
    added = (k * (c[..., -1:] - c).exp()[..., None]).transpose(-1, -2) @ v
    total = c[..., -1].cumsum(-1)
    gap = F.pad(total, (1, 0))[..., :-1, None] - total[..., None, :]
    weight = gap.masked_fill(~torch.ones(chunks, chunks, dtype=torch.bool).tril(-1), -torch.inf).exp()
    before = (weight @ added.flatten(-2)).view_as(added)
    pairs = (c[..., :, None] - c[..., None, :]).masked_fill(~own, -torch.inf).exp()
    return ((q @ k.transpose(-1, -2) * pairs) @ v + (q * c.exp()[..., None]) @ before).view(batch, heads, n, -1)


def chunk_loop(q, k, v, g):
    """One chunk after the other, each cut out by a slice."""
    own = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    s, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for at in range(0, q.shape[2], CHUNK):
        here = slice(at, at + CHUNK)
        a, b, e, c = q[:, :, here], k[:, :, here], v[:, :, here], g[:, :, here].cumsum(-1)
        pairs = (c[..., :, None] - c[..., None, :]).masked_fill(~own, -torch.inf).exp()
        outs.append((a @ b.transpose(-1, -2) * pairs) @ e + (a * c.exp()[..., None]) @ s)
        left = b * (c[..., -1:] - c).exp()[..., None]
        s = c[..., -1].exp()[..., None, None] * s + left.transpose(-1, -2) @ e
    return torch.cat(outs, 2)


def tensors(n, dtype, decay):
    torch.manual_seed(0)
    given = [(0.3 * torch.randn(1, HEADS, n, WIDTH)).to(dtype).requires_grad_() for _ in range(3)]
    if decay:
        given.append((-0.1 * torch.rand(1, HEADS, n)).requires_grad_())
    return given, torch.randn(1, HEADS, n, WIDTH).to(dtype)


def best_ms(ways, given, dout, repeats):
    """The least time of forward and backward of each way, in turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.process_time()
            torch.autograd.grad(run(*given), given, dout)
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def engine(name):
    return lambda *given: linear_scan(*given, engine=name)[0]


def measure():
    torch.set_num_threads(1)
    figures = {"fma GFLOP/s": round(native.fma_rate(None, torch.float32) / 1e9)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        ways = {"native": engine("scan:native"), "torch": engine("scan:torch"), "prefix": parallel_prefix}
        figures[f"linear {name} 4096 ms"] = best_ms(ways, *tensors(4096, dtype, False), 7)
    for n, repeats in ((4096, 5), (16384, 2)):
        ways = {"native": engine("scan:native"), "torch": engine("scan:torch"), "prefix": parallel_prefix}
        ways["loop"] = chunk_loop
        figures[f"decayed float32 {n} ms"] = best_ms(ways, *tensors(n, torch.float32, True), repeats)
    for name in ("scan:native", "scan:torch"):
        each = {n: best_ms({"": engine(name)}, *tensors(n, torch.float32, True), 4)[""] / n for n in (4096, 65536)}
        figures[f"{name} time per token, 65536 against 4096"] = each[65536] / each[4096]
    figures["decode step us"] = decode_us()
    figures["delta float32 4096 ms"] = delta_ms(4096)
    return figures


def decode_us():
    q, k, v = torch.randn(3, 1, HEADS, 1, WIDTH).unbind()
    g = -torch.rand(1, HEADS, 1)
    _, state = linear_scan(q, k, v, g)
    ways = {"step": lambda: linear_scan(q, k, v, g, initial_state=state), "memory pass": lambda: state.s * 0.5 + 1.0}
    best = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():
        for _ in range(20):
            for name, run in ways.items():
                start = time.process_time()
                for _ in range(100):
                    run()
                best[name] = min(best[name], 1e4 * (time.process_time() - start))
    return best


def delta_ms(n):
    given, dout = tensors(n, torch.float32, True)
    q, k, v, g = given
    given = [*(F.normalize(x.detach(), dim=-1).requires_grad_() for x in (q, k)), v, torch.rand(1, HEADS, n), g]
    given[3].requires_grad_()
    ways = {"delta": lambda *x: delta_rule(*x)[0], **transformers_way()}
    return best_ms(ways, given, dout, 4)


def transformers_way():
    """Its torch fallback with normalised keys, in our order of arguments; nothing where it is not installed."""
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as fallback
    except ImportError:
        return {}

    def run(q, k, v, beta, g):
        q, k, v, beta, g = (x.transpose(1, 2) for x in (q, k, v, beta, g))
        return fallback(q, k, v, g=g, beta=beta)[0].transpose(1, 2)

    return {"transformers": run}


def measure_loop():
    torch.set_num_threads(1)
    return best_ms({"native": engine("scan:native"), "loop": chunk_loop}, *tensors(16384, torch.float32, True), 2)


if __name__ == "__main__":
    print(json.dumps(measure_loop() if sys.argv[1:] == ["loop"] else measure()))
