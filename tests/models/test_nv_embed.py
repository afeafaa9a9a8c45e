"""A language model as embedder: which tokens are pooled, that pads do not matter, and that the model is left alone."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from regard import (
    Bidirectional,
    LatentAttentionPool,
    MultiLayerPool,
    OptionError,
    ShapeError,
    TextEmbedder,
    Unsupported,
    steer,
)
from regard.bench.text.trainable_pooling import paired_p
from regard.hosts.transformers.specimens import make, prompt
from regard.layers.pooling import Pool
from regard.primitives.contrastive import retrieval_nce
from tests.docstrings import docstring_pairs
from tests.minilm import minilm

WORDS = ["[PAD]", "[UNK]", "[BEGIN]", "[END]", "Instruct", "Query", ":", *(f"w{i}" for i in range(50))]
POOLS = ("mean", "last", "latent", "multilayer")


def word_tokenizer(begin=True, end=True, limit=64):
    """A word a token, with a token before and after the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    single = f"{'[BEGIN] ' if begin else ''}$A{' [END]' if end else ''}"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[BEGIN]", 2), ("[END]", 3)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=limit
    )


def embedder(family="llama", pool="latent", **options):
    torch.manual_seed(1)
    return TextEmbedder(make(family), word_tokenizer(), pool, **options)


def moved_to(padded, ids, row=0, count=4):
    """A row of ids with pads on one side, beside a whole row."""
    pads = torch.zeros(count, dtype=torch.long)
    own = torch.cat((pads, ids[row, count:]) if padded == "left" else (ids[row, count:], pads))
    padding = own != 0
    return torch.stack((own, ids[1])), torch.stack((padding, torch.ones_like(padding)))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_pads_on_either_side_and_in_between_change_nothing(family, pool, bidirectional):
    model = embedder(family, pool, bidirectional=bidirectional)
    ids = prompt(length=12)["input_ids"]
    alone = model(ids[:1, 4:])
    other = model(ids[1:])
    assert float(alone.detach().norm()) == pytest.approx(1, abs=1e-5)
    for side in ("left", "right"):
        both, padding = moved_to(side, ids)
        found = model(both, padding=padding)
        torch.testing.assert_close(found, torch.cat((alone, other)), rtol=1e-4, atol=1e-5)
    padding = torch.ones(1, 12, dtype=torch.bool)
    padding[0, [1, 5, 6, 10]] = False
    torch.testing.assert_close(model(ids[:1], padding=padding), model(ids[:1][padding][None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_is_the_unit_vector_of_the_pooled_states_of_the_bidirectional_model(family):
    model, inputs = make(family), prompt(length=10)
    with steer(model, Bidirectional()):
        states = model.base_model(**inputs, output_hidden_states=True)
    pools = {
        "mean": (Pool(32), states.last_hidden_state),
        "latent": (LatentAttentionPool(32, num_latents=5), states.last_hidden_state),
        # the embeddings, hidden_states[0], are no layer
        "layers": (
            MultiLayerPool(32, num_layers=len(states.hidden_states) - 1, heads=4, num_latents=5),
            torch.stack(states.hidden_states[1:], 1),
        ),
    }
    for pool, given in pools.values():
        wanted = torch.nn.functional.normalize(pool(given), dim=-1)
        torch.testing.assert_close(TextEmbedder(model, None, pool)(inputs["input_ids"]), wanted, rtol=1e-5, atol=1e-6)


def test_the_last_token_is_seen_by_the_first_if_bidirectional():
    ids = prompt(length=8)["input_ids"]
    other = ids.clone()
    other[:, -1] = ids[:, -1] % 40 + 3
    only_first = torch.zeros_like(ids, dtype=torch.bool)
    only_first[:, 0] = True
    for bidirectional in (True, False):
        model = embedder(pool="mean", bidirectional=bidirectional)
        same = torch.equal(model(ids, pooled=only_first), model(other, pooled=only_first))
        assert same is not bidirectional


def test_the_foreign_model_writes_as_before():
    model, inputs = make("llama"), prompt(length=8)
    plain = model(**inputs).logits
    for pool in POOLS:
        TextEmbedder(model, None, pool)(inputs["input_ids"])
        assert torch.equal(model(**inputs).logits, plain)
        assert not hasattr(model.config, "is_causal")


def test_tokens_of_the_instruction_are_read_but_not_pooled():
    model = embedder(pool="mean")
    made = model.tokens(["w1 w2", "w3"], instruction="w7 w8 w9")
    words = [[WORDS[i] for i in row] for row in made.ids.tolist()]
    head = ["[BEGIN]", "Instruct", ":", "w7", "w8", "w9", "Query", ":"]
    assert words == [[*head, "w1", "w2", "[END]"], [*head, "w3", "[END]", "[PAD]"]]
    assert made.pooled.tolist() == [[False] * 8 + [True] * 3, [False] * 8 + [True, True, False]]
    assert made.padding.tolist() == [[True] * 11, [True] * 10 + [False]]
    plain = model.tokens(["w1 w2", "w3"])
    assert torch.equal(plain.pooled, plain.padding) and plain.pooled.tolist() == [[True] * 4, [True] * 3 + [False]]
    seen = [model.encode(["w1 w2"], instruction=text) for text in (None, "w7", "w8")]
    assert (seen[1] - seen[2]).abs().max() > 1e-4 < (seen[0] - seen[1]).abs().max()


class Untouched(torch.nn.Module):
    """Tokens as embedded, with nothing between them: what an attention that is the identity leaves."""

    def __init__(self):
        super().__init__()
        self.inner = make("llama").model

    def forward(self, input_ids, **given):
        class Out:
            last_hidden_state = self.inner.embed_tokens(input_ids)

        return Out


def test_without_attention_the_instruction_leaves_no_trace():
    model = embedder(pool="latent", bidirectional=False)
    inner, model.model = model.model, Untouched()
    first, second = (model.encode(["w1 w2 w3"], instruction=text) for text in ("w7 w8", "w9 w10 w11"))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    made = model.tokens(["w1 w2 w3"])
    # the same text without its begin: the tokens after an instruction
    own = model.model(made.ids).last_hidden_state[:, 1:]
    wanted = torch.nn.functional.normalize(model.pool(own), dim=-1)
    torch.testing.assert_close(first, wanted, rtol=1e-5, atol=1e-6)
    model.model = inner


def test_texts_come_in_batches_and_in_order():
    model = embedder()
    texts = [f"w{i} w{(7 * i) % 50}" + " w4" * (i % 5) for i in range(7)]
    whole = model.encode(texts)
    assert not whole.requires_grad and whole.shape == (7, 32)
    torch.testing.assert_close(model.encode(texts, batch_size=3), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([model.encode([text]) for text in texts]), whole, rtol=1e-4, atol=1e-5)


def test_what_was_cut_off_does_not_matter():
    model = TextEmbedder(make("llama"), word_tokenizer(limit=8), "mean")
    first, second = model.encode(["w1 w2 w3 w4 w5 w6 w7 w8", "w1 w2 w3 w4 w5 w6 w9"])
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    with pytest.raises(OptionError, match="the instruction fills all 8 tokens"):
        model.encode(["w1"], instruction="w2 w3 w4 w5 w6")


def test_half_precision_gives_unit_vectors_in_float32():
    model = embedder().bfloat16()
    out = model(prompt(length=8)["input_ids"])
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2), rtol=1e-6, atol=1e-6)


def test_model_and_pool_are_trained_together():
    model = embedder(pool=LatentAttentionPool(32, num_latents=8, heads=2))
    queries = model.tokens([f"w{i} w{i + 1}" for i in range(8)], instruction="w40")
    documents = model.tokens([f"w{i + 20} w3" for i in range(8)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        ids, padding, pooled = queries
        found = model(ids, padding=padding, pooled=pooled)
        loss = retrieval_nce(found, model(documents.ids, padding=documents.padding), temperature=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def checkpointed():
    model = embedder()
    model.model.gradient_checkpointing_enable()
    model.train()(prompt()["input_ids"])


@pytest.mark.parametrize(
    "do, error, message",
    [
        (lambda: embedder().encode(["w1", ""], instruction="w2"), OptionError, "it is empty"),
        (lambda: embedder().encode(["  "]), OptionError, "it is empty"),
        (lambda: embedder().encode([]), OptionError, "a list of texts"),
        (lambda: embedder().encode("w1"), OptionError, "a list of texts"),
        (lambda: TextEmbedder(make("llama")).encode(["w1"]), Unsupported, "fast tokenizer"),
        (lambda: embedder(pool="middle"), OptionError, "'middle'"),
        (lambda: embedder(pool=Pool(31)), OptionError, "width of 31, the model has 32"),
        (
            lambda: embedder(pool=MultiLayerPool(32, num_layers=32, heads=4)),
            OptionError,
            "built for 32 layers, the model has 3",
        ),
        (lambda: TextEmbedder(torch.nn.Linear(2, 2)), OptionError, "not on a Linear"),
        (lambda: embedder("t5"), Unsupported, "no causal mask to take off"),
        (lambda: embedder()(torch.ones(2, 3, dtype=torch.long), padding=torch.ones(2, 4) > 0), ShapeError, r"\(2, 3\)"),
        (lambda: embedder()(torch.ones(2, 3, dtype=torch.long), pooled=torch.ones(2, 3)), ShapeError, "bool"),
        (
            lambda: embedder()(torch.ones(2, 3, dtype=torch.long), pooled=torch.zeros(2, 3) > 0),
            OptionError,
            "no token of row 0 is pooled",
        ),
        (checkpointed, Unsupported, "runs layers again"),
    ],
)
def test_what_cannot_be_is_refused(do, error, message):
    with pytest.raises(error, match=message):
        do()


def test_a_real_encoder_embeds_as_it_was_made_to():
    model, tokenizer = minilm()
    texts = ["The cat sleeps on the warm roof.", "A kitten naps on top of the house.", "Interest rates rose in March."]
    found = TextEmbedder(model, tokenizer, "mean").encode(texts)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)
    wanted = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    cosines = found @ found.T
    assert cosines[0, 1] > 0.4 > 0.2 > cosines[0, 2]


def trained(pool, pairs, test, *, base, tokenizer, frozen, steps, seed=0, batch=32, lr=3e-3):
    """Reciprocal ranks (Q,) of test answers after training on pairs; the same pairs in the same order for every pool."""
    torch.manual_seed(seed)
    model = TextEmbedder(base(), tokenizer, pool())
    model.model.requires_grad_(not frozen)
    weights = [p for p in model.parameters() if p.requires_grad]
    queries, answers = (model.tokens([pair[i] for pair in pairs]) for i in (0, 1))
    generator = torch.Generator().manual_seed(seed)
    if weights:
        optimiser = torch.optim.AdamW(weights, lr=lr)
        for step in range(steps):
            rows = torch.randint(len(pairs), (batch,), generator=generator)
            found = [model(x.ids[rows], padding=x.padding[rows]) for x in (queries, answers)]
            loss = retrieval_nce(*found, temperature=0.05)
            optimiser.zero_grad()
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimiser.step()
    query, answer = (model.encode([pair[i] for pair in test], batch_size=100) for i in (0, 1))
    scores = query @ answer.T
    return 1 / (1 + (scores > scores.diagonal()[:, None]).sum(1))


def test_on_a_frozen_model_latents_learn_which_words_answer_which():
    # every word of a query has an answer of its own; the queries of the test are other pairs of the same words
    generator = torch.Generator().manual_seed(0)
    partner = torch.randperm(20, generator=generator) + 20
    pairs = [(f"w{a} w{b}", f"w{partner[a]} w{partner[b]}") for a in range(20) for b in range(a)]
    order = torch.randperm(len(pairs), generator=generator).tolist()
    test, train = [pairs[i] for i in order[:50]], [pairs[i] for i in order[50:]]
    given = {"base": lambda: make("llama"), "tokenizer": word_tokenizer(), "frozen": True, "steps": 150}
    found = {
        "latent": trained(lambda: LatentAttentionPool(32, num_latents=16, heads=4), train, test, **given),
        "mean": trained(lambda: Pool(32), train, test, **given),
    }
    # of 50 answers, guessing finds 0.09
    print({name: float(x.mean()) for name, x in found.items()})
    assert found["latent"].mean() > found["mean"].mean() + 0.1
    assert paired_p(found["latent"], found["mean"]) < 0.01


@pytest.mark.slow
def test_latent_and_mean_pooling_on_local_texts(record):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    pairs = docstring_pairs()
    test, train = pairs[:200], pairs[200:]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    made.train_from_iterator([text for pair in train for text in pair], words)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    )

    def base():
        return hf.MistralModel(
            hf.MistralConfig(
                vocab_size=1500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, sliding_window=None, pad_token_id=0,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip

    pools = {"mean": lambda: Pool(64), "latent": lambda: LatentAttentionPool(64, num_latents=32, heads=4)}
    rows = []
    for frozen in (True, False):
        found = {name: [] for name in pools}
        for seed in (0, 1):
            for name, pool in pools.items():
                found[name].append(
                    trained(
                        pool, train, test, base=base, tokenizer=tokenizer, frozen=frozen, steps=120, seed=seed, lr=2e-3
                    )
                )
        ranks = {name: torch.cat(x) for name, x in found.items()}
        figures = {
            name: {"mrr": float(x.mean()), "recall_at_1": float((x == 1).float().mean())} for name, x in ranks.items()
        }
        rows.append(
            {"model": "frozen" if frozen else "trained", **figures, "p": paired_p(ranks["latent"], ranks["mean"])}
        )
    record({"pairs": len(train), "tested": len(test), "seeds": 2, "steps": 120, "chance_mrr": 0.029, "rows": rows})
    frozen, whole = rows
    # a pool that learns helps a model that does not
    assert frozen["latent"]["mrr"] > frozen["mean"]["mrr"] and frozen["p"] < 0.01
    # where the model learns too, both find answers
    assert min(whole["latent"]["mrr"], whole["mean"]["mrr"]) > 0.15


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("pool", ["latent", "multilayer"])
def test_a_model_with_adapters_is_trained_through_them_and_the_pool_alone(pool):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    # the papers' adapters
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=SEVEN)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(make("llama"), config)
    model = TextEmbedder(adapted, word_tokenizer(), pool)
    texts, instruction = ["w1 w2 w3", "w4 w5 w6 w7", "w8 w9"], "w40 w41"
    model.eval()
    bare = TextEmbedder(make("llama"), word_tokenizer(), model.pool).eval()
    assert torch.equal(model.encode(texts, instruction), bare.encode(texts, instruction)), "new adapters add nothing"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(2):
        tokens = [model.tokens(texts, asked) for asked in (instruction, None)]
        queries, documents = (model(x.ids, padding=x.padding, pooled=x.pooled) for x in tokens)
        optimiser.zero_grad()
        retrieval_nce(queries, documents, temperature=0.05).backward()
        optimiser.step()
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 2 * len(SEVEN) * 3
    for name, parameter in model.named_parameters():
        learns = name in adapters or name.startswith("pool.")
        assert learns == parameter.requires_grad == (parameter.grad is not None), name
        assert torch.equal(parameter, before[name]) != learns, name
    model.eval()
    assert (model.encode(texts) - bare.encode(texts)).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(model.encode(texts), bare.encode(texts))


def test_prompts_that_an_adapter_learns_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(Unsupported, match="without the prompts that this adapter learns"):
        TextEmbedder(peft.get_peft_model(make("llama"), config), word_tokenizer())
