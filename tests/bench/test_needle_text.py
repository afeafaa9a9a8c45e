"""`regard needle` on text: any causal model with a tokenizer; what is hidden, asked, written, graded and refused."""

import json
import re

import pytest
import torch

import regard
from regard import OptionError, SnapKV, Unsupported, steer
from regard.bench.needle.cases import Notes, Text
from regard.bench.needle.measure import Plan, Subject, measure, summary
from regard.bench.needle.ways import Way, read_way
from regard.bench.recall.needle import greedy_answers, language_reference, magic_numbers, needle_cases, needle_grid
from regard.bench.results import Results
from regard.cli.main import main
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import make
from tests.text_lm import save_text_lm, text_lm, text_tokenizer


class Silent:
    def __init__(self):
        self.steps = []

    def advance(self, step, note):
        self.steps.append(step)


class Oracle:
    """Makes any model write what stands in the text, or, to some cities, another number."""

    card = InterventionCard(slug="oracle", title="oracle", exports=("x",), baseline=True, sites=("logits",))

    def __init__(self, tokenizer, mark, unknown=()):
        self.tokenizer, self.mark, self.unknown = tokenizer, mark, unknown
        self.questions = set()

    def on_logits(self, step, ids, logits):
        self.seen = ids if step.start == 0 else torch.cat((self.seen, ids), 1)
        logits = logits.clone()
        for row, ids in enumerate(self.seen.tolist()):
            # how many tokens were written since the mark
            last = ids[-40:]
            ends = [n for n in range(24) if self.tokenizer.decode(last[: len(last) - n]).endswith(self.mark)]
            text = self.tokenizer.decode(ids) if ends else ""
            found = re.findall(r"number for (\w+)\?", text)
            if ends and found:
                self.questions.add(found[-1])
                number = re.search(rf"number for {found[-1]} is (\d+)\.", text).group(1)
                said = "0" if found[-1] in self.unknown else number
                wanted = [*self.tokenizer(f" It is {said}.", add_special_tokens=False)["input_ids"], 1]
                logits[row] = float("-inf")
                logits[row, wanted[min(ends[0], len(wanted) - 1)]] = 0.0
        return logits


def subject_of(chat=False, tokens=32):
    tokenizer = text_tokenizer(chat)
    return Subject("m", text_lm(), Text(tokenizer, language_reference(), "a number hidden in text", tokens=tokens))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_case_hides_its_answer_once_and_ends_with_its_question(chat, depth):
    tokenizer = text_tokenizer(chat)
    cases = Text(tokenizer, language_reference(), "x").cases(300, depth, 5, seed=3)
    assert len({case.prompt.numpy().tobytes() for case in cases}) == 5
    for case, needle in zip(cases, magic_numbers(5, seed=3), strict=True):
        assert 296 <= len(case.prompt) <= 300
        text = tokenizer.decode(case.prompt)
        assert text.count(needle.sentence) == 1 and text.count("<s>") == 1 and text.startswith("<s>")
        place = case.needle[0] / case.asked
        assert place < 0.15 if depth == 0 else 0.3 < place < 0.6 if depth == 0.5 else place > 0.9
        assert needle.answer in tokenizer.decode(case.prompt[slice(*case.needle)])
        for ask in ("again", "later"):
            read, then = case.parts(ask)
            assert torch.equal(torch.cat((read, then)), case.prompt)
        question = tokenizer.decode(then)
        assert needle.question not in tokenizer.decode(read) and needle.question in question
        assert question.endswith("<|assistant|>" if chat else "Answer:")
        assert len(case.parts("again")[1]) == 1
        ids = tokenizer(f"It is {needle.answer}!", add_special_tokens=False)["input_ids"]
        assert case.right(ids) and not case.right(ids[:-4])


def test_the_prompts_are_those_of_the_needle_task():
    tokenizer = text_tokenizer()
    ours = Text(tokenizer, language_reference(), "x").cases(200, 0.4, 4, seed=1)
    theirs = needle_cases(tokenizer, [200], [0.4], needles=magic_numbers(4, seed=1))
    assert [tokenizer.decode(case.prompt, skip_special_tokens=True) for case in ours] == [c.prompt for c in theirs]


def test_notes_are_asked_a_second_time_and_their_needle_is_the_value():
    case = Notes(8).cases(128, 0.5, 2, seed=4)[1]
    made = regard.tiny.note_cases(2, 128, depth=0.5, seed=4)
    read, then = case.parts("again")
    assert torch.equal(read, made.ids[1]) and torch.equal(then, made.question[1])
    assert torch.equal(torch.cat(case.parts("later")), made.ids[1])
    value = int(made.answers[1, 0])
    assert case.prompt[slice(*case.needle)].tolist() == [value]
    assert case.right([value]) and not case.right([value - 1, value])


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_written_and_graded_as_the_task_grades_them(chat, tmp_path):
    subject = subject_of(chat)
    tokenizer = subject.source.tokenizer
    cities = [needle.question.split()[-1][:-1] for needle in magic_numbers(6)]
    oracle = Oracle(tokenizer, "<|assistant|>" if chat else "Answer:", unknown=cities[:2])
    plan, watcher = Plan(lengths=(160,), depths=(0.0, 1.0), rows=6), Silent()
    results = Results(tmp_path / "r.jsonl")
    lines = measure(subject, [Way("full"), Way("oracle", (oracle,))], plan, results, watcher)
    assert oracle.questions == set(cities) and watcher.steps == list(range(1, 9))
    for row in summary(lines):
        assert row["accuracy"] == (4 / 6 if row["way"] == "oracle" else 0.0) and row["chance"] == 0.0
    if not chat:
        cases = needle_cases(tokenizer, plan.lengths, plan.depths, needles=magic_numbers(6))
        with steer(subject.model, oracle):
            grid = needle_grid(greedy_answers(subject.model, tokenizer), cases)
        torch.testing.assert_close(grid.recall, torch.full((1, 2), 4 / 6))
    # the answer is longer than that
    short = Subject("short", subject.model, Text(tokenizer, language_reference(), "x", tokens=4))
    row = summary(measure(short, [Way("oracle", (oracle,))], Plan((160,), (0.0,), rows=6), results, watcher))[0]
    assert row["accuracy"] == 0.0


def test_an_end_sign_ends_an_answer(tmp_path):
    subject = subject_of()

    class Ends:
        card = Oracle.card

        def on_logits(self, step, ids, logits):
            # an end, and then what would be right
            number = subject.source.tokenizer(self.number, add_special_tokens=False)["input_ids"]
            wanted = [1, *number][min(max(step.decoded - 1, 0), len(number))]
            return torch.full_like(logits, float("-inf")).index_fill(1, torch.tensor([wanted]), 0.0)

    ends = Ends()
    ends.number = magic_numbers(1)[0].answer
    plan = Plan((160,), (0.5,), rows=1, asks=("again",))
    assert measure(subject, [Way("x", (ends,))], plan, Results(tmp_path / "r.jsonl"), Silent())[0]["accuracy"] == 0.0


def test_the_cache_is_given_up_before_the_answer_is_read(tmp_path):
    subject = subject_of()
    plan = Plan((200,), (0.5,), rows=3)
    ways = [Way("full"), Way("snap", (SnapKV(budget=40, window=16),))]
    lines = measure(subject, ways, plan, Results(tmp_path / "r.jsonl"), Silent())
    held = {(line["way"], line["ask"]): line["cache_bytes"] for line in lines}
    # keys and values of 2 layers, 2 key heads of 8, float32
    size = 2 * 2 * 2 * 8 * 4
    lengths = [(len(c.prompt), len(c.prompt) - c.asked) for c in subject.source.cases(200, 0.5, 3)]
    assert held["full", "again"] == held["full", "later"] == sum(n for n, _ in lengths) * size // 3
    assert held["snap", "again"] == (40 + 1) * size
    assert held["snap", "later"] == (3 * 40 + sum(n for _, n in lengths)) * size // 3


def test_every_prompt_is_read_whole_in_batches_without_pads(tmp_path):
    subject, read, most = subject_of(tokens=2), {}, {}
    for batch in (1, 4):
        done, sizes = [], []

        class Look:
            card = Oracle.card

            def on_logits(self, step, ids, logits, done=done, sizes=sizes):
                sizes.append(len(ids))
                self.seen = ids if step.start == 0 else torch.cat((self.seen, ids), 1)
                done.extend(self.seen.tolist())
                return logits

        plan = Plan((160,), (0.5,), rows=8, asks=("later",), batch=batch)
        measure(subject, [Way("look", (Look(),))], plan, Results(tmp_path / f"{batch}.jsonl"), Silent())
        read[batch], most[batch] = done, max(sizes)
    prompts = [case.prompt.tolist() for case in subject.source.cases(160, 0.5, 8)]
    assert all(prompt in read[batch] for batch in read for prompt in prompts)
    assert most[1] == 1 and 1 < most[4] <= 4


# ---- the command


def run(folder, out, *more):
    return main(["needle", str(folder), "--depths", "0.5", "--lengths", "160", "--rows", "2", "--out", str(out), *more])


@pytest.mark.parametrize("chat", [False, True])
def test_a_folder_with_a_tokenizer_is_asked_about_text(chat, tmp_path, capsys):
    folder = save_text_lm(tmp_path / "my-lm", chat=chat)
    assert run(folder, tmp_path / "out", "--steer", "snapkv:budget=40,window=16", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["way"], row["ask"]) for row in rows] == [
        (way, ask) for ask in ("again", "later") for way in ("full", "snapkv:budget=40,window=16")
    ]
    page = (tmp_path / "out" / "needle.html").read_text()
    assert "What does my-lm still find?" in page and "chance 0." in page
    assert ("A number hidden in Python&#39;s language reference, asked for in a chat;" in page) == chat
    before = (tmp_path / "out" / "needle.jsonl").read_bytes()
    assert run(folder, tmp_path / "out") == 0
    assert (tmp_path / "out" / "needle.jsonl").read_bytes() == before
    # the page shows what was asked for, and no more
    assert "snapkv" not in (tmp_path / "out" / "needle.html").read_text().partition("<script>")[0]
    # another text is another case
    (tmp_path / "story.txt").write_text("A cat sat on a mat. " * 50)
    assert run(folder, tmp_path / "out", "--text", str(tmp_path / "story.txt")) == 0
    assert len((tmp_path / "out" / "needle.jsonl").read_bytes().splitlines()) == 6
    assert "A number hidden in story.txt" in (tmp_path / "out" / "needle.html").read_text()


def test_tiny_lm_is_asked_for_notes_unless_text_is_wanted(tmp_path, capsys):
    model, tokenizer = regard.tiny.lm()
    model.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both")
    (tmp_path / "story.txt").write_text("A cat sat on a mat. " * 50)
    for name, more, notes in [
        ("bare", (), True), ("both", (), True), ("both", ("--case", "text"), False),
        ("both", ("--text", str(tmp_path / "story.txt")), False), ("both", ("--case", "notes"), True),
    ]:  # fmt: skip
        out = tmp_path / f"out-{name}-{len(more)}-{notes}"
        assert run(tmp_path / name, out, "--json", "--ask", "later", *more) == 0
        row = json.loads(capsys.readouterr().out)[0]
        assert row["chance"] == (1 / 8 if notes else 0)
        assert row["accuracy"] == (1.0 if notes else 0.0)


@pytest.mark.parametrize(
    "kind, more, message",
    [
        ("text", ("--lengths", "590"), "has 600 positions; a prompt of 590 tokens and its answer need 621"),
        ("text", ("--lengths", "20"), "has no room for the needle"),
        ("text", ("--case", "notes"), "notes are written in tiny-lm's vocabulary"),
        ("text", ("--text", "nowhere.txt"), "--text takes a file"),
        ("text", ("--rows", "21"), "ask for 20 rows or fewer"),
        ("text", ("--rows", "0"), "at least 1"),
        ("text", ("--steer", "snapvk"), "did you mean 'snapkv'"),
        ("bare", (), "has no tokenizer, which text needs"),
        ("gpt2", (), "has no tokenizer, which text needs"),
        ("bert", (), "holds no causal language model: it lacks cls"),
        ("vit", (), "holds no causal language model: Unrecognized configuration class"),
        ("empty", (), "neither tiny-lm nor a folder with a model"),
    ],
)
def test_what_cannot_be_asked_is_one_line(kind, more, message, tmp_path, capsys):
    folder = tmp_path / kind
    if kind == "text":
        save_text_lm(folder)
    elif kind != "empty":
        {"bare": text_lm}.get(kind, lambda: make(kind))().save_pretrained(folder)
    assert run(folder, tmp_path / "out", *more) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("regard: ") and message in last


def test_lengths_of_notes_count_the_second_ask(tmp_path):
    tiny = Subject("tiny-lm", regard.tiny.lm()[0], Notes(8))
    results, full = Results(tmp_path / "r.jsonl"), [read_way("full")]
    with pytest.raises(OptionError, match="a prompt of 2048 tokens and its answer need 2050"):
        measure(tiny, full, Plan((128, 2048), (0.5,), rows=1), results, Silent())
    assert results.lines == []
    assert len(measure(tiny, full, Plan((2048,), (0.5,), rows=1, asks=("later",)), results, Silent())) == 1


def test_models_and_tokenizers_that_cannot_are_refused(tmp_path):
    tokenizer = text_tokenizer()
    words = text_tokenizer()
    words.decode = lambda ids: "?"
    with pytest.raises(OptionError, match="does not give back a number"):
        Text(words, "text", "x")
    tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(Unsupported, match="chat template changes"):
        Text(tokenizer, language_reference(), "x").cases(200, 0.5, 1)
    model = text_lm()
    plain = model.forward
    model.forward = lambda ids, **more: plain(ids, use_cache=False)
    with pytest.raises(Unsupported, match="keeps no keys and values"):
        measure(
            Subject("m", model, Text(text_tokenizer(), language_reference(), "x")), [Way("full")],
            Plan((160,), (0.5,), rows=1), Results(tmp_path / "r.jsonl"), Silent(),
        )  # fmt: skip
