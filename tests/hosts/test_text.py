"""Words among tokens: with a tokenizer of bytes, and with one whose tokens take the blank before a word."""

import pytest
import tokenizers as parts
import transformers as hf

from regard import OptionError, ShapeError, Unsupported
from regard.bench.proving.tiny_lm import tokenizer as of_bytes
from regard.hosts.text import cut, find_words, insert_span, merge_pieces, occurrences

TEXT = "The magic number of Zürich is seven. A magic-number is no Magic Number; magicians say seven, seven."


def of_pieces():
    """Byte pairs learned on the text, so that some words are one token and others several."""
    made = parts.Tokenizer(parts.models.BPE())
    made.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = parts.decoders.ByteLevel()
    trainer = parts.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=parts.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"]
    )
    made.train_from_iterator([TEXT, "the needle in a haystack"], trainer)
    made.post_processor = parts.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def of_words():
    """BERT's: pieces go on with ##, blanks are nobody's, and words are lowered."""
    vocab = {
        x: i for i, x in enumerate(["[UNK]", "[CLS]", "[SEP]", "magic", "##ian", "##s", "number", "seven", "is", "."])
    }
    made = parts.Tokenizer(parts.models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = parts.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = parts.pre_tokenizers.BertPreTokenizer()
    made.post_processor = parts.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [of_bytes(), of_pieces(), of_words()], ids=["bytes", "pieces", "words"]
)


@TOKENIZERS
@pytest.mark.parametrize("special", [True, False])
def test_found_tokens_cover_the_word_and_none_beside_it(tokenizer, special):
    words = ["magic number", "seven", "Zürich", "is", "sev", "absent"]
    tokens, found = cut(tokenizer, TEXT, special=special), find_words(tokenizer, TEXT, words, special=special)
    assert [len(f) for f in found] == [1, 3, 1, 2, 0, 0]
    for word, spans in zip(words, found, strict=True):
        for (first, last), (start, end) in zip(spans, occurrences(TEXT, word), strict=True):
            covered = TEXT[tokens.offsets[first][0] : tokens.offsets[last - 1][1]]
            assert covered.strip() == word == TEXT[start:end]
            # the same by the definition, one token at a time
            inside = [bool(set(range(*o)) & set(range(start, end))) for o in tokens.offsets]
            assert [i for i, yes in enumerate(inside) if yes] == list(range(first, last))


def test_case_and_blanks():
    assert len(occurrences(TEXT, "magic number", any_case=True)) == 2
    assert occurrences("new\n  york", "New York", any_case=True) == [(0, 10)]
    # signs at its ends have no letters beside them to mind
    assert occurrences("see C++ and C.", "C++") == [(4, 7)]


@TOKENIZERS
@pytest.mark.parametrize("at", [0, 3, len(TEXT)])
def test_an_inserted_piece_is_found_though_the_text_holds_it_already(tokenizer, at):
    piece = " The magic number of Zürich is seven. "
    made = insert_span(tokenizer, TEXT, piece, at)
    assert made.tokens.text == TEXT[:at] + piece + TEXT[at:]
    assert list(made.tokens.ids) == tokenizer(made.tokens.text)["input_ids"]
    first, last = made.span
    covered = made.tokens.text[made.tokens.offsets[first][0] : made.tokens.offsets[last - 1][1]]
    assert covered.strip() == piece.strip()
    assert made.tokens.offsets[first][1] > at
    assert made.tokens.offsets[last - 1][0] < at + len(piece)


def test_a_token_that_reaches_over_the_border_counts():
    made = insert_span(of_pieces(), "a mag", "ic number", 5)
    assert made.tokens.text == "a magic number"
    assert made.tokens.text[made.tokens.offsets[made.span[0]][0] :] == " magic number"


@TOKENIZERS
def test_merged_pieces_keep_their_sum(tokenizer):
    tokens = cut(tokenizer, TEXT)
    values = [0.5 + i % 7 if a < b else 100.0 for i, (a, b) in enumerate(tokens.offsets)]
    words, merged = merge_pieces(tokens, values)
    assert words[:6] == ["The", "magic", "number", "of", "Zürich", "is"] and "magic-number" in words
    assert sum(merged) == pytest.approx(sum(v for v in values if v < 100))
    (first, last), *_ = find_words(tokenizer, TEXT, ["Zürich"])[0]
    # the blank before the word may be a token of its own
    assert 0 <= merged[4] - sum(values[first:last]) <= 6.5
    assert merge_pieces(tokens, values, "max")[1][4] >= max(values[first:last])
    mean = merge_pieces(tokens, [1.0] * len(values), "mean")[1]
    assert mean == [1.0] * len(words)


def test_blanks_join_the_word_after_them():
    words, merged = merge_pieces(cut(of_bytes(), "a bc ", special=False), [1, 10, 100, 1000, 10000])
    assert (words, merged) == (["a", "bc"], [1, 11110])


def test_text_without_words():
    assert merge_pieces(cut(of_bytes(), "  "), [1.0, 2.0, 3.0]) == ([], [])


def test_what_is_refused():
    tokenizer = of_bytes()
    with pytest.raises(Unsupported, match="fast"):
        cut(object(), TEXT)
    with pytest.raises(OptionError, match="empty"):
        find_words(tokenizer, TEXT, [" "])
    with pytest.raises(OptionError, match="empty"):
        insert_span(tokenizer, TEXT, "\n", 0)
    with pytest.raises(OptionError, match="characters"):
        insert_span(tokenizer, TEXT, "x", len(TEXT) + 1)
    with pytest.raises(ShapeError, match="one each"):
        merge_pieces(cut(tokenizer, TEXT), [1.0])
    with pytest.raises(OptionError, match="mean"):
        merge_pieces(cut(tokenizer, "a"), [1.0, 1.0], "median")
    with pytest.raises(OptionError, match="cut off"):
        cut(tokenizer, TEXT).span(1000, 1004)
