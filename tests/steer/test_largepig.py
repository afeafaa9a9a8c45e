"""LargePiG against its formula on what transformers itself reports, and on a model that copies badly."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from regard import LargePiG, OptionError, ShapeError, SnapKV, Unsupported, layer_divergence, lens, steer
from regard import record as record_sites
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import make, prompt

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "gpt2", "deepseek")
WRITTEN = 5


def write(model, inputs, **options):
    options = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


def with_gains(family):
    """A model whose norms change what they norm: one applied twice shows."""
    model = make(family)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or "ln_" in name):
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return model


def divergences(p, others, kind):
    """By torch's own words, as the released code and the textbook have it."""
    found = []
    for q in others:
        m = (p.softmax(-1) + q.softmax(-1)) / 2
        terms = []
        for x in (p, q):
            if kind == "official":
                terms.append(F.kl_div(x.log_softmax(-1), m, reduction="none").mean(-1))
            else:
                terms.append(F.kl_div(m.log(), x.softmax(-1), reduction="none").sum(-1))
        found.append(sum(terms) / 2)
    return torch.stack(found)


def oracle(model, ids, source, layers, *, scale=100.0, cap=0.5, normalise=False, kind="official", contrast=None):
    """P of the next token of one row without pads, and the gate."""
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
        head, final = model.get_output_embeddings(), (getattr(model, "model", None) or model.transformer)
        final = getattr(final, "norm", None) or final.ln_f
        p = head(out.hidden_states[-1][:, -1])
        others = [head(final(out.hidden_states[layer][:, -1])) for layer in layers]
    pointing = torch.zeros_like(p)
    a = out.attentions[-1][0, :, -1].mean(0)
    if normalise:
        total = sum(float(a[j]) + 1e-7 for j in source)
        a = (a + 1e-7) / total
    for j in source:
        pointing[0, ids[0, j]] += a[j]
    far = divergences(p, others, kind)
    gate = float((scale * far.max(0).values).clamp(0, cap))
    plain = out.logits[:, -1]
    if contrast is not None:
        anchor = others[int(far.argmax(0))]
        likely = plain.softmax(-1) >= contrast * plain.softmax(-1).max()
        plain = (plain.log_softmax(-1) - anchor.log_softmax(-1)).masked_fill(~likely, -math.inf)
    return gate * pointing + (1 - gate) * plain.softmax(-1), gate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalise": True, "cap": 0.3},
        {"scale": 3.0},
        {"kind": "jsd", "scale": 0.9},
        {"contrast": 0.1},
        {"contrast": 0.0, "scale": 5.0},
    ],
    ids=str,
)
def test_every_step_is_the_formula(family, options):
    model, ids = with_gains(family), prompt(batch=1, length=14)["input_ids"]
    given = {**options, "divergence": options.get("kind", "official"), "candidate_layers": (1, 2), "source": (3, 11)}
    given.pop("kind", None)
    if "contrast" in given:
        given["relative_top"], given["contrast"] = given["contrast"], True
    with steer(model, LargePiG(**given)):
        sequences, logits = write(model, {"input_ids": ids})
    model.set_attn_implementation("eager")
    gates = []
    for step in range(WRITTEN):
        wanted, gate = oracle(model, sequences[:, : 14 + step], range(3, 11), (1, 2), **options)
        torch.testing.assert_close(logits[step].exp(), wanted, rtol=1e-3, atol=2e-6)
        gates.append(gate)
    assert all(gate > 0 for gate in gates)


def test_the_source_holds_a_word_twice():
    # else nothing above would see sums
    ids = prompt(batch=1, length=14)["input_ids"][0, 3:11].tolist()
    repeated = torch.tensor([[2, 9, 9, 30, 9, 4, 30, 5]])
    model = make("llama")
    with steer(model, LargePiG(candidate_layers=(1,))):
        found = write(model, {"input_ids": repeated}, max_new_tokens=1)[1][0].exp()
    model.set_attn_implementation("eager")
    wanted, _ = oracle(model, repeated, range(8), (1,))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-6)
    assert len(ids) == 8


def test_sums_and_what_is_never_raised():
    model, inputs = make("llama"), prompt(length=14, padded=3)
    with torch.no_grad():
        p = model(**inputs).logits[:, -1].softmax(-1)
    with steer(model, LargePiG(source=(2, 9))), torch.no_grad():
        some = model(**inputs).logits[:, -1].exp()
    with steer(model, LargePiG(source=(2, 9), normalise=True)), torch.no_grad():
        whole = model(**inputs).logits[:, -1].exp()
    torch.testing.assert_close(whole.sum(-1), torch.ones(2))
    assert (some.sum(-1) < 1).all() and (some >= 0).all()
    # row 0 begins with three pads
    for row, words in enumerate((inputs["input_ids"][0, 5:12], inputs["input_ids"][1, 2:9])):
        outside = ~torch.isin(torch.arange(60), words)
        shares = some[row, outside] / p[row, outside]
        torch.testing.assert_close(shares, shares[:1].expand_as(shares), rtol=1e-4, atol=1e-5)
        assert 0.5 <= float(shares[0]) < 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padded", [0, 4])
def test_a_scale_of_nought_is_the_plain_model_to_the_bit(family, padded):
    model, inputs = make(family), prompt(length=12, padded=padded)
    plain = write(model, inputs)
    for off in ({"scale": 0.0}, {"cap": 0.0}):
        with steer(model, LargePiG(**off)):
            ours = write(model, inputs)
        assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_the_gate_is_shut_where_all_layers_agree():
    model, inputs = make("llama"), prompt(length=12)
    # the last layer adds nothing, so that the stream before it says what the last one says
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    with torch.no_grad():
        p = model(**inputs).logits[:, -1].softmax(-1)
    with steer(model, LargePiG(candidate_layers=(2,))), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[:, -1].exp(), p, rtol=1e-5, atol=1e-6)
    with steer(model, LargePiG(candidate_layers=(1, 2))), torch.no_grad():
        assert (model(**inputs).logits[:, -1].exp() - p).abs().max() > 1e-3


def test_divergences():
    torch.manual_seed(0)
    p, others = torch.randn(3, 11, dtype=torch.float64) * 3, torch.randn(4, 3, 11, dtype=torch.float64) * 3
    for kind in ("official", "jsd"):
        torch.testing.assert_close(layer_divergence(p, others, kind), divergences(p, others, kind))
        assert (layer_divergence(p, p[None], kind) < 1e-12).all()
    assert (layer_divergence(p, others, "jsd") <= math.log(2)).all()
    apart = torch.tensor([[80.0, 0.0]]), torch.tensor([[[0.0, 80.0]]])
    assert float(layer_divergence(*apart, "jsd")) == pytest.approx(math.log(2))


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("source", [None, (2, 6), (-5, None), slice(1, 8, 2), "mask"])
def test_a_batch_with_pads_is_its_rows(source, contrast):
    model, inputs = make("llama"), prompt(length=14, padded=5, seed=8)
    mask = torch.rand(2, 14, generator=torch.Generator().manual_seed(0)) > 0.4
    # the anchor of a row is its own: a batch has more than one
    settings = {"scale": 20.0, "candidate_layers": (0, 1, 2), "contrast": contrast}
    with steer(model, LargePiG(**settings, source=mask if source == "mask" else source)):
        sequences, logits = write(model, inputs)
    for row, start in ((0, 5), (1, 0)):
        own = mask[row : row + 1, start:] if source == "mask" else source
        with steer(model, LargePiG(**settings, source=own)):
            alone = write(model, {name: x[row : row + 1, start:] for name, x in inputs.items()})
        assert torch.equal(alone[0][0], sequences[row, start:])
        torch.testing.assert_close(alone[1][:, 0], logits[:, row], rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_have_anchors_of_their_own():
    # else the test above would not see one anchor for all
    model, inputs = make("llama"), prompt(length=14, padded=5, seed=8)
    tape = record_sites(model, inputs, sites=("resid_pre", "final"))
    last = lens(model, tape["final", 0][:, -1], norm=False)
    far = layer_divergence(last, torch.stack([lens(model, tape["resid_pre", layer][:, -1]) for layer in range(3)]))
    assert len(far.argmax(0).unique()) == 2


def test_a_head_wider_than_the_vocabulary_is_written_with_whole():
    model, inputs = make("llama"), prompt(batch=1, length=12)
    model.resize_token_embeddings(64)
    model.config.vocab_size = 60
    with steer(model, LargePiG(candidate_layers=(1,), source=(3, 11))), torch.no_grad():
        found = model(**inputs).logits[:, -1].exp()
    model.set_attn_implementation("eager")
    wanted, gate = oracle(model, inputs["input_ids"], range(3, 11), (1,))
    assert found.shape == (1, 64) and gate > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-6)


def test_begin_end_and_pads_are_never_copied():
    model, inputs = make("llama"), prompt(length=12)
    inputs["input_ids"][:, 0] = 1
    inputs["input_ids"][:, 5] = 7
    model.generation_config.eos_token_id = [7, 8]
    with torch.no_grad():
        p = model(**inputs).logits[:, -1].softmax(-1)
    with steer(model, LargePiG(normalise=True)), torch.no_grad():
        found = model(**inputs).logits[:, -1].exp()
    shares = found / p
    torch.testing.assert_close(shares[:, 1], shares[:, 7], rtol=1e-4, atol=0)
    assert (shares[:, 1] < 1).all()


def test_a_source_mask_of_ones_own():
    model, inputs = make("llama"), prompt(length=12)
    uncertain = inputs["input_ids"][:, 4:8].contiguous()

    def certain(ids):
        return ~torch.isin(ids, uncertain)

    chosen = certain(inputs["input_ids"])
    with steer(model, LargePiG(source_mask=certain)):
        ours = write(model, inputs)
    with steer(model, LargePiG(source=chosen)):
        same = write(model, inputs)
    torch.testing.assert_close(ours[1], same[1])
    # nothing certain is left: what is written is what the model writes
    with steer(model, LargePiG(source_mask=lambda ids: torch.zeros_like(ids, dtype=torch.bool))):
        nothing = write(model, inputs)
    assert torch.equal(nothing[0], write(model, inputs)[0])


def test_default_candidates_are_the_even_ones_of_the_last_fifth():
    from regard.steer.decoding.largepig import _candidates

    assert _candidates(None, 32) == (26, 28, 30)
    assert _candidates(None, 24) == (20, 22)
    assert _candidates(None, 3) == (2,)


def test_beams_search_in_the_mixture():
    # with one beam, and with a search by hand over log P
    model, inputs = make("llama"), prompt(length=12, padded=2)
    effect = LargePiG(scale=20.0, candidate_layers=(1,), normalise=True)
    with steer(model, effect):
        greedy = write(model, inputs)[0]
        assert torch.equal(write(model, inputs, num_beams=1)[0], greedy)
        beams = write(model, inputs, num_beams=4, max_new_tokens=3)[0]
    for row, start in ((0, 2), (1, 0)):
        ids, hypotheses = inputs["input_ids"][row : row + 1, start:], [([], 0.0)]
        for _ in range(3):
            options = []
            for tokens, score in hypotheses:
                with steer(model, effect), torch.no_grad():
                    # the source is the prompt alone, so that the prompt comes first and the rest after it
                    cache = model(ids, use_cache=True)
                    for token in tokens:
                        cache = model(torch.tensor([[token]]), past_key_values=cache.past_key_values, use_cache=True)
                log_p = cache.logits[0, -1].log_softmax(-1)
                options += [([*tokens, t], score + float(log_p[t])) for t in range(60)]
            hypotheses = sorted(options, key=lambda one: -one[1])[:4]
        assert beams[row, 12:].tolist() == hypotheses[0][0]


def test_the_prompt_may_come_in_pieces():
    model, inputs = make("llama"), prompt(length=14)
    with steer(model, LargePiG()):
        whole = write(model, inputs)
        pieces = write(model, inputs, prefill_chunk_size=5)
    assert torch.equal(whole[0], pieces[0])
    torch.testing.assert_close(whole[1], pieces[1], rtol=1e-4, atol=1e-4)
    late = torch.zeros(2, 14, dtype=torch.bool)
    late[:, 9:13] = True
    with steer(model, LargePiG(source=late)):
        assert torch.equal(write(model, inputs)[0], write(model, inputs, prefill_chunk_size=5)[0])


class Before:
    """Keeps the last layer's calls, and the logits that come to what stands after it."""

    card = InterventionCard(slug="before", title="before", exports=("x",), baseline=True, sites=("weights", "logits"))

    def __init__(self):
        self.calls, self.logits = [], []

    def on_read(self, call, seen):
        if call.layer == 2:
            self.calls.append(call)

    def on_logits(self, step, ids, logits):
        self.logits.append(logits)
        return logits


def test_keys_that_were_given_up_are_pointed_at_by_their_place():
    model, inputs, before = make("llama"), prompt(length=20, padded=3), Before()
    pig = LargePiG(source=(0, 12), scale=1e9, candidate_layers=(1,))
    with steer(model, SnapKV(budget=10, window=3, kernel=3), before, pig):
        _, logits = write(model, inputs)
    for step in range(1, WRITTEN):
        call, p = before.calls[step], before.logits[step].softmax(-1)
        assert call.k.shape[2] < 20 + step
        wanted = torch.zeros(2, 60)
        weights = call.weights()
        for row, pads in ((0, 3), (1, 0)):
            for head in range(4):
                for key, place in enumerate(call.positions[row, head // 2].tolist()):
                    if pads <= place < pads + 12:
                        wanted[row, inputs["input_ids"][row, place]] += 0.5 * weights[row, head, 0, key] / 4
        torch.testing.assert_close(logits[step].exp() - 0.5 * p, wanted, rtol=1e-3, atol=1e-5)


def test_sliding_layers_point_at_their_window():
    model, inputs = make("gemma3"), prompt(batch=1, length=14)
    settings = {"scale": 1e9, "candidate_layers": (1,), "attention_layer": 0}
    with steer(model, LargePiG(**settings)):
        sequences, logits = write(model, inputs)
    # a window of 4: words before it are not raised
    tape = record_sites(model, sequences[:, :-1], sites=("weights",))
    weights = tape["weights", 0][0, :, 14].mean(0)
    assert (weights[:11] == 0).all() and weights[11:].sum() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        p = model(sequences[:, :15]).logits[0, -1].softmax(-1)
    gained = logits[1][0].exp() - 0.5 * p
    wanted = torch.zeros(60).scatter_add(0, inputs["input_ids"][0, 11:], 0.5 * weights[11:14])
    torch.testing.assert_close(gained, wanted, rtol=1e-3, atol=1e-5)


def test_a_recording_sees_the_model_and_not_the_lens():
    model, inputs = make("llama"), prompt(length=12)
    plain = record_sites(model, inputs, sites=("final",))
    with steer(model, LargePiG()):
        ours = record_sites(model, inputs, sites=("final",))
    assert torch.equal(plain["final", 0], ours["final", 0])


def test_the_lens_of_the_last_stream_is_the_logits():
    for family in FAMILIES:
        model, inputs = with_gains(family), prompt(length=8)
        tape = record_sites(model, inputs, sites=("final", "resid_post"))
        torch.testing.assert_close(lens(model, tape["final", 0], norm=False), tape.output.logits)
        torch.testing.assert_close(lens(model, tape["resid_post", -1]), tape.output.logits)


def test_what_is_refused():
    model, inputs = make("llama"), prompt(length=12)
    for wrong, text in (
        ({"scale": -1.0}, "0 or more"),
        ({"cap": 1.5}, "cap"),
        ({"divergence": "js"}, "jsd"),
        ({"divergence": "jsd"}, r"1\.4427"),
        ({"relative_top": 1.0}, "share"),
        ({"candidate_layers": ()}, "no candidate"),
    ):
        with pytest.raises(OptionError, match=text):
            LargePiG(**wrong)
    for layers in ((3,), (1, -1)):
        with pytest.raises(OptionError, match=r"0 to 2.*own anchor"), steer(model, LargePiG(candidate_layers=layers)):
            pass
    with pytest.raises(OptionError, match="attention_layer"), steer(model, LargePiG(attention_layer=3)):
        pass
    for empty in ((4, 4), (30, 40), torch.zeros(2, 12, dtype=torch.bool)):
        with pytest.raises(OptionError, match="row 0 holds no word"), steer(model, LargePiG(source=empty)):
            model(**inputs)
    with pytest.raises(ShapeError, match=r"\(2, 12\)"), steer(model, LargePiG(source=torch.ones(2, 9))):
        model(**inputs)
    with pytest.raises(Unsupported, match="input ids"), steer(model, LargePiG()):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="before the block"), steer(model, LargePiG()):
        model(torch.tensor([[3], [4]]), past_key_values=cache)
    with pytest.raises(Unsupported, match="encoder"), steer(make("t5"), LargePiG()):
        pass
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(Unsupported, match="Falcon"), steer(hf.FalconForCausalLM(hf.FalconConfig(**sizes)), LargePiG()):
        pass


# ---- a model that copies words it has hardly ever written

WORDS, SPAN = 1000, 12
BEGIN, COPY = WORDS, WORDS + 1
RARE = WORDS // 4


def spans(rows, generator, power):
    """begin, different words drawn by rank ** -power, copy, the words again."""
    chances = (torch.arange(1, WORDS + 1).float() ** -power).expand(rows, -1)
    words = torch.multinomial(chances, SPAN, generator=generator)
    ends = [torch.full((rows, 1), token) for token in (BEGIN, COPY)]
    return torch.cat((ends[0], words, ends[1], words), 1)


def copier(steps):
    """Two layers trained to copy words drawn by rank ** -1.6, the rare ones with 5 % wrong labels."""
    generator = torch.Generator().manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=WORDS + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, bos_token_id=BEGIN, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        ids = spans(64, generator, 1.6)
        labels = ids[:, SPAN + 2 :]
        wrong = (labels >= RARE) & (torch.rand(labels.shape, generator=generator) < 0.05)
        labels = torch.where(wrong, torch.randint(0, WORDS, labels.shape, generator=generator), labels)
        loss = F.cross_entropy(model(ids).logits[:, SPAN + 1 : -1].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def next_words(model, ids, effect=None):
    """The logits (SPAN, B, V) at every place of the copy, each from a pass of its own."""
    found = []
    with torch.no_grad():
        for t in range(SPAN):
            with steer(model, *([] if effect is None else [effect])):
                found.append(model(ids[:, : SPAN + 2 + t]).logits[:, -1])
    return torch.stack(found)


def copied(logits, ids):
    """The share of words copied right, and that of rare words."""
    wanted = ids[:, SPAN + 2 :].T
    right = logits.argmax(-1) == wanted
    return float(right.float().mean()), float(right[wanted >= RARE].float().mean())


@pytest.mark.slow
def test_it_copies_what_its_model_cannot_write(record):
    torch.manual_seed(0)
    model = copier(400)
    source = (1, SPAN + 1)
    figures = {}
    for name, power in (("as trained", 1.6), ("all words alike", 0.0)):
        ids = spans(300, torch.Generator().manual_seed(99), power)
        plain = next_words(model, ids)
        rows = {"plain": copied(plain, ids)}
        for way, options in (
            ("largepig", {}),
            ("normalised", {"normalise": True}),
            ("scale 500", {"scale": 500.0}),
            ("jsd, scale 1", {"divergence": "jsd", "scale": 1.0}),
            ("contrast, no pointer", {"contrast": True, "scale": 0.0}),
            ("contrast", {"contrast": True}),
        ):
            ours = next_words(model, ids, LargePiG(source=source, **options))
            rows[way] = copied(ours, ids)
            if not options:
                outside = ~torch.zeros(300, WORDS + 2).scatter(1, ids[:, 1 : SPAN + 1], 1.0).bool()
                assert (ours.exp() <= plain.softmax(-1) * (1 + 1e-4) + 1e-9)[:, outside].all()
        figures[name] = {way: {"all": round(a, 4), "rare": round(r, 4)} for way, (a, r) in rows.items()}
        assert rows["largepig"][0] >= rows["plain"][0] + 0.05
        assert rows["largepig"][1] >= rows["plain"][1] + 0.05
    record({"words": WORDS, "rare_from": RARE, "steps": 400, "copied": figures})


@pytest.mark.slow
def test_pointing_at_notes_with_tiny_lm(record):
    """What it does for a model that fetches notes already, and begins to fail where rows are long."""
    import regard

    model, _ = regard.tiny.lm()
    figures = []
    for notes, length, rows in ((8, 512, 48), (16, 1024, 96), (8, 2048, 48)):
        cases = regard.tiny.note_cases(rows, length, notes=notes, asks=1, seed=5)
        spans = cases.note_spans
        at = torch.arange(length)
        of_notes = ((at >= spans[..., :1]) & (at < spans[..., 1:])).any(1)
        line = {"notes": notes, "length": length, "rows": rows, "chance": cases.chance}
        ways = {"plain": None, "pointing anywhere": LargePiG(), "pointing at notes": LargePiG(source=of_notes)}
        ways |= {"pointing at notes, scale 500": LargePiG(source=of_notes, scale=500.0, normalise=True)}
        for way, effect in ways.items():
            right = []
            for some, keep in zip(cases.split(8), of_notes.split(8), strict=True):
                chosen = effect if effect is None or effect.source is None else LargePiG(
                    source=keep, scale=effect.scale, normalise=effect.normalise
                )  # fmt: skip
                with steer(model, *([] if chosen is None else [chosen])), torch.no_grad():
                    logits = model(some.ids, attention_mask=some.valid.long()).logits[:, -1]
                right.append(logits.argmax(-1) == some.answers[:, -1])
            line[way] = round(float(torch.cat(right).float().mean()), 4)
        figures.append(line)
    record({"lines": figures})
    # no claim that it helps; it must not break what works
    assert figures[0]["pointing at notes"] >= figures[0]["plain"] - 0.05
