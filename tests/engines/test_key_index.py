"""An index of keys: the graph by hand, in C++ and against scoring every key, on queries that lie apart from the keys."""

import importlib.util
import statistics
import time

import pytest
import torch

from regard.contract.dispatch import listen
from regard.contract.errors import MissingExtra, OptionError, ShapeError, Unsupported
from regard.engines import key_graph, key_index, native
from regard.engines.key_index import KINDS, Graph, KeyIndex
from regard.engines.native import key_index as native_graph
from tests.engines.hnswlib_walk import Walk, keys_scored

OWN = ("flat", "ivf", "graph")
here = pytest.mark.skipif(native_graph.missing() is not None, reason=f"no native index: {native_graph.missing()}")
ENGINES = ("torch", pytest.param("native", marks=here))
ISAS = native.isas() if native_graph.missing() is None else ()


def apart(keys=20000, queries=8000, asked=200, d=64, seed=0):
    """Keys around nothing, and queries around a point, in directions of their own: (keys, queries, asked)."""
    generator = torch.Generator().manual_seed(seed)
    turn, other = (torch.linalg.qr(torch.randn(d, d, generator=generator))[0] for _ in range(2))
    widths = torch.arange(1, d + 1) ** -0.75
    widths = widths / widths.norm() * d**0.5
    made = torch.randn(keys, d, generator=generator) * widths @ turn
    middle = torch.randn(d, generator=generator) * 0.7
    wanted = torch.randn(queries + asked, d, generator=generator) * widths @ other + middle
    return made, wanted[:queries], wanted[queries:]


def whole(*shape, seed=0):
    """Small whole numbers: products and their sums are exact in any order, and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def recall(ids, keys, queries):
    """The share of the true best that was found."""
    best = (queries @ keys.T).topk(ids.shape[1]).indices
    return (ids.unsqueeze(2) == best.unsqueeze(1)).any(1).float().mean().item()


def reached(index):
    """Which keys a walk along the links comes to."""
    seen, new = torch.zeros(len(index), dtype=torch.bool), torch.tensor([index.entry])
    while len(new):
        seen[new] = True
        ahead = index.links[new].flatten().long().unique()
        new = ahead[(ahead >= 0) & ~seen[ahead.clamp(min=0)]]
    return seen


def test_flat_finds_what_brute_force_finds():
    keys, _, asked = apart(500, 100, 30, 24)
    ids, scanned = KeyIndex.build(keys).search(asked, 10)
    scores = asked @ keys.T
    for row, found in enumerate(ids):
        order = sorted(range(500), key=lambda j: -scores[row, j].item())
        assert found.tolist() == order[:10]
    assert (scanned == 500).all()
    # by inner product: long keys win over near ones
    ids, _ = KeyIndex.build(torch.tensor([[1.0, 0.0], [5.0, 4.0]])).search(torch.tensor([[1.0, 0.0]]), 1)
    assert ids.item() == 1


@pytest.mark.parametrize("kind", OWN)
def test_with_k_of_all_keys_all_are_found_best_first(kind):
    keys, queries, asked = apart(60, 40, 5, 8)
    index = KeyIndex.build(keys, queries, kind, engine="torch" if kind == "graph" else None)
    for k in (60, 100):
        ids, scanned = index.search(asked, k)
        assert torch.equal(ids, (asked @ keys.T).sort(dim=1, descending=True).indices)
        assert (scanned == 60).all()
    # also one less, by the index's own way: what is asked for is found, however little effort is allowed
    ids, _ = index.search(asked, 59, effort=1)
    assert all(len(set(row.tolist())) == 59 and row.min() >= 0 for row in ids)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keys, queries, degree", [(300, 80, 6), (300, 3, 4), (90, 300, 35), (1, 1, 4), (2, 5, 4)])
def test_every_key_is_reached_and_no_key_has_more_links_than_its_degree(engine, keys, queries, degree):
    made, wanted, _ = apart(keys, queries, 0, 16)
    index = KeyIndex.build(made, wanted, "graph", degree=degree, query_neighbours=20, engine=engine)
    assert reached(index).all()
    assert index.links.shape == (keys, degree)
    for key, row in enumerate(index.links.tolist()):
        used = [x for x in row if x >= 0]
        assert row == used + [-1] * (degree - len(used)), "free places stand behind"
        assert len(set(used)) == len(used) and key not in used


@here
def test_every_key_of_a_large_graph_is_reached():
    keys, queries, _ = apart(20000, 500)
    index = KeyIndex.build(keys, queries, "graph")
    assert index.best.unique().numel() < 10000, "most keys are wanted by no query"
    assert reached(index).all()


def test_links_are_those_of_the_definition():
    # on a line, queries that want the right end: the best key is linked to its neighbour, which hides the others
    keys = torch.stack((torch.arange(6.0), torch.zeros(6)), 1)
    index = KeyIndex.build(keys, torch.tensor([[1.0, 0.0]]), "graph", degree=4, query_neighbours=4, engine="torch")
    assert index.best.tolist() == [[5, 4, 3, 2]] and index.entry == 5
    # 4 hides 3 and 2, which fill up
    assert index.forward[5].tolist() == [4, 3, 2, -1]
    assert index.links[5, :2].tolist() == [4, 3]
    assert 5 in index.links[4].tolist() and 5 in index.links[3].tolist()
    assert reached(index).all()
    ids, scanned = index.search(torch.tensor([[-1.0, 0.0]]), 1, effort=6)
    assert ids.tolist() == [[0]] and scanned.item() == 6


@here
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keys, queries, d, degree", [(250, 100, 16, 8), (120, 200, 5, 35), (150, 2, 33, 4)])
def test_the_native_graph_is_the_one_of_the_definition(isa, keys, queries, d, degree, poisoned):
    made, wanted, asked = whole(keys, d), whole(queries, d, seed=1), whole(40, d, seed=2)
    ours = KeyIndex.build(made, wanted, "graph", degree=degree, query_neighbours=25, engine="torch")
    assert isinstance(ours, Graph)
    pivots = ours.best[:, 0].unique()
    order = ours.best[:, 0].sort(stable=True)
    starts = torch.cat((torch.searchsorted(order.values, pivots), torch.tensor([queries])))
    table, nothing = (ours.keys, ours.half), torch.full_like(ours.forward, -1)
    forward = native_graph.project(*table, ours.best, pivots, starts, order.indices.int(), nothing, isa)
    assert torch.equal(forward, ours.forward)
    links = native_graph.link(*table, forward, degree, ours.entry, isa)
    assert torch.equal(links, ours.links)
    wide = torch.nn.functional.pad(asked, (0, ours.keys.shape[1] - d))
    for k, effort in ((10, 5), (3, 40), (keys - 1, 1)):
        found = native_graph.search(*table, links, ours.entry, wide, k, effort, isa)
        wished = key_graph.search(*table, links, ours.entry, wide, k, effort)
        assert all(map(torch.equal, found, wished))


@pytest.fixture
def poisoned():
    native.poison(True)
    yield
    native.poison(False)


@here
def test_two_threads_make_the_same_graph_and_find_the_same_keys():
    keys, queries, asked = apart(3000, 1500, 100)
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        index = KeyIndex.build(keys, queries, "graph", engine="native")
        made.append((index.links, *index.search(asked, 20)))
    torch.set_num_threads(1)
    assert all(map(torch.equal, *made))


@here
def test_queries_apart_from_the_keys_are_served_from_few_keys():
    keys, queries, asked = apart()
    index = KeyIndex.build(keys, queries, "graph")
    ids, scanned = index.search(asked, 100)
    found = recall(ids, keys, asked)
    assert found >= 0.9
    assert scanned.float().mean() <= 0.05 * 20000
    lists = KeyIndex.build(keys, kind="ivf")
    for effort in range(14, 64, 2):
        ids, probed = lists.search(asked[:50], 100, effort=effort)
        if recall(ids, keys, asked[:50]) >= found:
            break
    assert probed.float().mean() >= 3 * scanned.float().mean()


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("engine", ENGINES)
def test_inserting_is_as_good_as_building_at_once(kind, engine):
    if kind != "graph" and engine == "native":
        pytest.skip("has one implementation")
    keys, queries, asked = apart(700 if engine == "torch" else 4000, 300, 200, 32)
    options = {"graph": {"engine": engine, "degree": 24}, "ivf": {"lists": 20}}.get(kind, {})
    once = KeyIndex.build(keys, queries, kind, **options)
    first = KeyIndex.build(keys[:500], queries, kind, **options)
    before = first.search(asked, 10)
    later = first.insert(keys[500:600]).insert(keys[600:])
    assert len(first) == 500 and len(later) == len(keys)
    assert all(map(torch.equal, first.search(asked, 10), before)), "the index inserted into has changed"
    effort = 8 if kind == "ivf" else None
    shares = [recall(index.search(asked, 20, effort=effort)[0], keys, asked) for index in (once, later)]
    assert abs(shares[0] - shares[1]) <= 0.02
    assert min(shares) >= 0.6
    if kind == "graph":
        assert reached(later).all()
        assert torch.equal(once.best.sort(1).values, later.best.sort(1).values)


@pytest.mark.parametrize("engine", ENGINES)
def test_new_queries_lead_to_keys_that_the_first_ones_did_not_want(engine):
    keys, queries, _ = apart(600, 200, 0, 16)
    others = -queries
    index = KeyIndex.build(keys, queries[:20], "graph", degree=8, query_neighbours=30, engine=engine)
    more = index.insert(keys[:1], others[:100])
    grown = torch.cat((keys, keys[:1]))
    small = {"k": 10, "effort": 10}
    without = recall(index.insert(keys[:1]).search(others[100:], **small)[0], grown, others[100:])
    assert recall(more.search(others[100:], **small)[0], grown, others[100:]) > without


def test_an_index_is_for_floats_of_any_kind_and_keeps_none_of_the_callers_memory():
    keys, queries, asked = apart(100, 50, 4, 12)
    plain = KeyIndex.build(keys, queries, "graph", engine="torch").search(asked, 5)
    keys64 = keys.double().requires_grad_()
    index = KeyIndex.build(keys64, queries.double(), "graph", engine="torch")
    assert all(map(torch.equal, index.search(asked.double(), 5), plain))
    assert index.nbytes >= 100 * 16 * 4


def test_what_an_index_holds_does_not_follow_the_callers_keys():
    keys, _, asked = apart(100, 50, 4, 16)
    for kind in ("flat", "graph"):
        given = keys.clone()
        index = KeyIndex.build(given, asked, kind, engine="torch" if kind == "graph" else None)
        before = index.search(asked, 5)[0]
        given.zero_()
        assert torch.equal(index.search(asked, 5)[0], before)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (OptionError, "prefill queries are needed", lambda k: KeyIndex.build(k, kind="graph")),
        (OptionError, "prefill queries are needed", lambda k: KeyIndex.build(k, k[:0], "graph")),
        (OptionError, "kind is one of flat", lambda k: KeyIndex.build(k, kind="tree")),
        (OptionError, "degree is at least 4", lambda k: KeyIndex.build(k, k, "graph", degree=3)),
        (OptionError, "lists is 1 to the number of keys", lambda k: KeyIndex.build(k, kind="ivf", lists=99)),
        (ShapeError, "keys are", lambda k: KeyIndex.build(k[None])),
        (ShapeError, "at least one key", lambda k: KeyIndex.build(k[:0])),
        (ShapeError, r"\(N, 8\)", lambda k: KeyIndex.build(k, k[:, :4], "graph")),
        (ShapeError, r"\(N, 8\)", lambda k: KeyIndex.build(k).search(k[:, :4], 1)),
        (ShapeError, r"\(N, 8\)", lambda k: KeyIndex.build(k).insert(k[0])),
        (OptionError, "numbers from 1", lambda k: KeyIndex.build(k).search(k, 0)),
        (OptionError, "numbers from 1", lambda k: KeyIndex.build(k).search(k, 1, effort=0)),
        (OptionError, "no engine 'cuda'", lambda k: KeyIndex.build(k, k, "graph", engine="cuda")),
    ],
)
def test_what_cannot_be_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call(whole(20, 8))


def test_without_the_library_a_named_engine_is_refused_and_the_other_runs(monkeypatch):
    monkeypatch.setattr(native_graph, "missing", lambda: "it was not built")
    with pytest.raises(Unsupported, match="it was not built"):
        KeyIndex.build(whole(20, 8), whole(5, 8), "graph", engine="native")
    assert KeyIndex.build(whole(20, 8), whole(5, 8), "graph").search(whole(3, 8), 2)[0].shape == (3, 2)


def test_an_older_library_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(native, "library", object)
    assert "before it had an index" in str(native_graph.missing())


LIBRARIES = {"faiss_hnsw": "faiss", "faiss_ivf": "faiss", "faiss_pq": "faiss", "hnswlib": "hnswlib"}
theirs = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed"),
        )
        for kind, library in LIBRARIES.items()
    ],
)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_without_its_library_a_kind_is_refused_by_name(kind, monkeypatch):
    monkeypatch.setattr(key_index, "installed", lambda module: False)
    package = {"faiss": "faiss-cpu"}.get(LIBRARIES[kind], LIBRARIES[kind])
    with pytest.raises(MissingExtra, match=f"kind='{kind}' needs '{LIBRARIES[kind]}'.*pip install {package}"):
        KeyIndex.build(whole(20, 8), kind=kind)


def far(kind):
    """An effort with which 400 keys are all looked at."""
    return 40 if kind == "faiss_ivf" else 400


@theirs
@pytest.mark.parametrize("d", [16, 7])
def test_libraries_are_other_indexes(kind, d):
    assert kind in KINDS
    keys, queries, _ = apart(400, 50, 0, d)
    index = KeyIndex.build(keys, kind=kind, lists=40)
    ids, scanned = index.search(queries, 5, effort=far(kind))
    best = (queries @ keys.T).topk(5).indices
    assert recall(ids, keys, queries) >= 0.9
    if kind in ("faiss_ivf", "faiss_pq"):
        # all lists, and all codes: nothing can be missed
        assert torch.equal(ids, best)
    few, near = index.search(queries, 5, effort=5)
    assert recall(few, keys, queries) < recall(ids, keys, queries)
    if kind == "hnswlib":
        assert (scanned == -1).all(), "it does not tell"
    else:
        assert (near > 0).all() and (near < scanned).all()
    # what is found comes best first
    scores = torch.einsum("nd,nkd->nk", queries, keys[few])
    assert (scores.diff(dim=1) <= 1e-5).all()
    assert index.nbytes >= 400 * d * 4 * (1.1 if kind == "faiss_pq" else 2)
    everything, _ = index.search(queries, 400)
    assert torch.equal(everything, (queries @ keys.T).sort(dim=1, descending=True).indices)
    assert index.search(queries[:0], 5)[0].shape == (0, 5)


@theirs
def test_libraries_take_more_keys_and_the_index_before_stays(kind):
    keys, queries, _ = apart(400, 60, 0, 16)
    first = KeyIndex.build(keys[:300], kind=kind, lists=40)
    before = first.search(queries, 20), first.nbytes
    later = first.insert(keys[300:350]).insert(keys[350:])
    other = first.insert(-keys[300:])
    assert (len(first), len(later), len(other)) == (300, 400, 400)
    assert all(map(torch.equal, first.search(queries, 20), before[0])) and first.nbytes == before[1]
    assert later.nbytes > first.nbytes
    found, _ = later.search(queries, 20, effort=far(kind))
    assert recall(found, keys, queries) >= 0.9 and (found >= 300).any()
    once = KeyIndex.build(keys, kind=kind, lists=40).search(queries, 20, effort=far(kind))[0]
    assert abs(recall(found, keys, queries) - recall(once, keys, queries)) <= 0.05
    # the other one has other keys under the same numbers
    turned = torch.cat((keys[:300], -keys[300:]))
    assert recall(other.search(queries, 20, effort=far(kind))[0], turned, queries) >= 0.9


@pytest.mark.skipif(importlib.util.find_spec("hnswlib") is None, reason="hnswlib is not installed")
@pytest.mark.parametrize("k, effort", [(10, 10), (10, 60), (40, 5)])
def test_the_walk_that_counts_hnswlibs_keys_finds_what_it_finds(k, effort):
    keys, _, asked = apart(3000, 50, 60, 16)
    index = KeyIndex.build(keys[:2500], kind="hnswlib").insert(keys[2500:])
    walk = Walk(index.own)
    ids, _ = index.search(asked, k, effort=effort)
    walked = [walk.search(query, k, effort) for query in asked.numpy()]
    assert ids.tolist() == [found for found, _ in walked]
    assert all(max(k, effort) < taken < 3000 for _, taken in walked)


@theirs
@pytest.mark.parametrize("keys", [1, 2, 9])
def test_libraries_serve_few_keys_and_grow(kind, keys, capfd):
    made, queries, _ = apart(60, 8, 0, 16)
    index = KeyIndex.build(made[:keys], kind=kind)
    assert torch.equal(index.search(queries, 20)[0], (queries @ made[:keys].T).sort(dim=1, descending=True).indices)
    grown = index.insert(made[keys:])
    found, _ = grown.search(queries, 5, effort=60)
    assert recall(found, made, queries) == 1
    assert capfd.readouterr() == ("", ""), "faiss warns of few points otherwise"
    alike = KeyIndex.build(torch.ones(40, 16), kind=kind)
    ids, _ = alike.search(queries, 5, effort=40)
    assert all(len(set(row)) == 5 and min(row) >= 0 for row in ids.tolist())


def test_where_links_lead_to_fewer_keys_hnswlib_fills_up():
    pytest.importorskip("hnswlib", reason="hnswlib is not installed")
    keys, _, asked = apart(2000, 50, 20, 64)
    index = KeyIndex.build(keys, kind="hnswlib")
    ids, _ = index.search(asked, 1999)
    found = (ids >= 0).sum(1)
    assert (found < 1999).any() and (found > 1800).all()
    for row, count in zip(ids.tolist(), found.tolist(), strict=True):
        assert row[count:] == [-1] * (1999 - count) and len(set(row[:count])) == count


def test_the_choice_of_the_graphs_steps_is_heard():
    keys, queries, _ = apart(60, 20, 0, 8)
    with listen() as verdicts:
        KeyIndex.build(keys, queries, "graph", degree=8)
    assert {v.name for v in verdicts} == {"key_index:native", "key_index:torch"}
    assert {v.name for v in verdicts if v.chosen} == {
        "key_index:torch" if native_graph.missing() else "key_index:native"
    }


EFFORTS = {
    "graph": (25, 50, 100, 200), "ivf": (4, 8, 16, 32, 64), "faiss_hnsw": (100, 200, 400, 800),
    "faiss_ivf": (4, 8, 16, 32, 64), "faiss_pq": (100, 200, 400, 800), "hnswlib": (100, 200, 400, 800),
}  # fmt: skip


@pytest.mark.slow
@here
def test_an_index_of_100000_keys(record):
    keys, queries, asked = apart(100000, 8192)
    figures = {}
    for kind, efforts in EFFORTS.items():
        if kind in LIBRARIES and importlib.util.find_spec(LIBRARIES[kind]) is None:
            continue
        if LIBRARIES.get(kind) == "faiss":
            importlib.import_module("faiss").omp_set_num_threads(1)
        begin = time.process_time()
        index = KeyIndex.build(keys, queries, kind)
        figures[kind] = {"build_s": time.process_time() - begin, "bytes": index.nbytes, "curve": []}
        for effort in efforts:
            ids, scanned = index.search(asked, 100, effort=effort)
            times = []
            for _ in range(5):
                begin = time.process_time()
                index.search(asked, 100, effort=effort)
                times.append((time.process_time() - begin) / len(asked))
            figures[kind]["curve"].append(
                {"effort": effort, "recall": recall(ids, keys, asked),
                 "scanned": keys_scored(index, asked, 100, effort, scanned) / 1e5, "us_a_query": statistics.median(times) * 1e6}
            )  # fmt: skip
        begin = time.process_time()
        index.insert(keys[:512], queries[:512])
        figures[kind]["insert_512_s"] = time.process_time() - begin
    flat = KeyIndex.build(keys)
    begin = time.process_time()
    flat.search(asked, 100)
    figures["flat_us_a_query"] = (time.process_time() - begin) / len(asked) * 1e6
    record({"keys": 100000, "d": 64, "queries": 8192, "k": 100, "threads": 1, **figures})
    assert figures["graph"]["curve"][2]["recall"] >= 0.8
