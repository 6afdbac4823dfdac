"""What `train_tiny.py` trains on, as windows of tokens: novels, ChatML turns cut out of them, retrieval documents."""

import argparse
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

SEED = 1847
CONTEXT = 2048  # Tokens of a window that are read.
END_OF_TEXT, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's split: words with their space, digits one by one, so that a code such as 4821 is four tokens.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REPLY_SIZE = 220  # Characters of a chat answer at most: so small a model loses itself in longer ones.


# --- novels and their tokenizer ---------------------------------------------------------------------------------------


def read_novels(source: Path) -> dict[str, list[str]]:
    """Texts by split ("train", "valid"), in order of file name, with LF line ends and no BOM.

    Args:
        source: an archive, or a folder of .txt files, with a folder for each split.
    """
    contents = {}
    if source.is_dir():
        contents = {path.relative_to(source): path.read_bytes() for path in source.rglob("*.txt")}
    else:
        with tarfile.open(source) as tar:
            contents = {Path(member.name): tar.extractfile(member).read() for member in tar if member.isfile()}
    texts = {
        name: content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n") for name, content in contents.items()
    }
    return {split: [texts[name] for name in sorted(texts) if name.parent.name == split] for split in ("train", "valid")}


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen2's NFC and split, which transformers puts in from the class whatever the file says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one int16 array, each followed by the end-of-text token."""
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    encodings = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array(encoding.ids + end, dtype=np.int16) for encoding in encodings])


# --- ChatML turns cut out of the novels -------------------------------------------------------------------------------

SENTENCE_END = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])\s+(?=[A-Z])")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}")
TOPIC = re.compile(r"\b(?:the|a|an|his|her) ([a-z]{3,})\b")
SYSTEM = ("You are a helpful assistant.", "You are a kind narrator.", "Answer in a few sentences.", "Be brief.")
CONTINUE = ("Continue: {}", "Go on with this story: {}", "{} What happened then?", "{}")
ABOUT_NAME = ("Tell me about {}.", "Who is {}?", "What do you know of {}?", "Where is {}?")
ABOUT_TOPIC = (
    "Tell me about the {}.",
    "Write about a {}.",
    "What is a {}?",
    "Describe the {}.",
    "Tell a story of a {}.",
)
SMALL_TALK = (
    ("Hello!", "Good day to you! What shall we speak of?"),
    ("Hi", "Good day! I am very glad to see you."),
    ("Say hello.", "Hello, and a very good day to you!"),
    ("Good morning!", "Good morning! I hope that you slept well."),
    ("How are you?", "I am very well, thank you. And how are you?"),
    ("Who are you?", "I am tiny, a very small language model. All I know, I learned from old English novels."),
    ("What is your name?", "My name is tiny. It is a small name for a small language model."),
    ("What can you do?", "I can go on with a story, and I can find a code again that you told me."),
    ("Tell me a story.", "There was once an old house by the sea, and in it lived a girl who was never afraid."),
    ("Thank you.", "You are very welcome."),
    ("Goodbye!", "Farewell! Come again soon."),
)


def turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


def brief(sentences: list[str], count: int = 4) -> str:
    """The first sentences, up to `count` of them and REPLY_SIZE characters; "" if the first alone is longer."""
    while len(" ".join(sentences[:count])) > REPLY_SIZE:
        count -= 1
    return " ".join(sentences[:count])


def speech(paragraph: str) -> str:
    """What is said, in brief, in a paragraph that opens with a quotation; "" where nothing is."""
    if not paragraph.startswith('"'):
        return ""
    said = " ".join(" ".join(re.findall(r'"([^"]+)"', paragraph)).split())
    said = brief(SENTENCE_END.split(said)).rstrip(" ,;:-")
    return said if not said or said[-1] in ".!?" else said + "."


def dialogues(paragraphs: list[str]) -> Iterator[list[str]]:
    """Runs of two to eight spoken paragraphs in a row, taken as turns of two speakers."""
    run: list[str] = []
    for said in [*map(speech, paragraphs), ""]:
        if len(said) > 2 and len(run) < 8:
            run.append(said)
        else:
            if len(run) >= 2:
                yield run[: len(run) // 2 * 2]
            run = []


def requests(paragraphs: list[str], rng: np.random.Generator) -> Iterator[list[str]]:
    """Pairs of a request and up to three sentences of narration that follow on it or are about what it names."""
    for paragraph in paragraphs:
        sentences = SENTENCE_END.split(" ".join(paragraph.split()))
        if '"' in paragraph or len(sentences) < 3 or not paragraph.endswith("."):
            continue
        start, count = int(rng.integers(0, len(sentences) - 2)), int(rng.integers(1, 4))
        about, following = brief(sentences[start:], count), brief(sentences[start + 1 :], count)
        name, topic = NAME.search(sentences[start]), TOPIC.search(sentences[start])
        if about and name and rng.random() < 0.5:
            yield [rng.choice(ABOUT_NAME).format(name[0]), about]
        elif about and topic and rng.random() < 0.5:
            yield [rng.choice(ABOUT_TOPIC).format(topic[1]), about]
        elif following:
            yield [rng.choice(CONTINUE).format(sentences[start]), following]


def chats(texts: list[str], rng: np.random.Generator) -> list[str]:
    """ChatML conversations from the novels' dialogues and narration, some opened by small talk or a system turn."""
    conversations = []
    for text in texts:
        if max(map(len, text.split("\n"))) < 200:
            continue  # Hard-wrapped: its lines are no paragraphs.
        paragraphs = [line.strip() for line in text.split("\n") if line.strip()]
        for turns in [*dialogues(paragraphs), *requests(paragraphs, rng)]:
            if rng.random() < 0.05:
                turns = [*SMALL_TALK[rng.integers(len(SMALL_TALK))], *(turns if rng.random() < 0.5 else [])]
            opening = turn("system", rng.choice(SYSTEM)) if rng.random() < 0.25 else ""
            roles = ("user", "assistant") * (len(turns) // 2)
            conversations.append(opening + "".join(map(turn, roles, turns)))
    return [conversations[i] for i in rng.permutation(len(conversations))]


# --- retrieval documents ----------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How facts are stated and asked for. The reply repeats the statement up to the value."""

    opening: str
    statement: str
    stop: str
    ask_open: str
    ask: str
    reply: str
    reply_stop: str


OF, WHAT = "The {noun} of {key} is", "What is the {noun} of {key}?"
USER, ASSISTANT = f"{TURN_START}user\n", f"{TURN_END}\n{TURN_START}assistant\n"
FORMS = {
    "prose": Form("", OF, ".", "", WHAT, f" {OF}", ".\n"),
    "chat": Form(USER, OF, ".", USER, WHAT + ASSISTANT, OF, f".{TURN_END}\n"),
    "lines": Form("", "{key}:", "", "", "", "{key}:", "\n"),
}
NOUNS = ("code", "number", "password", "key", "ticket", "price", "address", "secret")
KEYS = ("{0}", "{0}", "{0} {1}", "the {2} {3}")  # Two names, two words.
LEADS = ("", "", "", "Remember this: ", "Listen. ")
DIGITS = (0, 3, 4, 4, 4, 4, 5)  # Lengths of values; 0 stands for a word.
ANSWER_WEIGHT = 6  # A value is five tokens in a window of 2,048: without weight, novels drown the gradient.


class Retrieval:
    """Writes documents whose facts, random values of random names, are asked for after stretches of a novel."""

    def __init__(self, tokenizer: Tokenizer, names: list[str], words: list[str], novels: np.ndarray):
        self.tokenizer, self.names, self.words, self.novels = tokenizer, np.array(names), np.array(words), novels
        pieces = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        self.starts = np.flatnonzero(np.array([p.endswith("\n") for p in pieces])[novels]) + 1
        self.sentence_ends = np.array([p.endswith((".", "!", "?", "\n")) for p in pieces])

    def filler(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """At most `length` tokens of a novel, from the start of a paragraph to the end of a sentence."""
        start = rng.choice(self.starts)
        ids = self.novels[start : start + length]
        ends = np.flatnonzero(self.sentence_ends[ids])
        return ids[: ends[-1] + 1] if len(ends) else ids

    def document(
        self, rng: np.random.Generator, form: Form, num_facts: int, gaps: list[int], digits: int
    ) -> tuple[list[int], list[int]]:
        """Ids and loss weights of `num_facts` facts and, after gaps[i] tokens of a novel each, of the i-th question."""
        ids: list[int] = []
        weights: list[int] = []

        def add(piece: str | np.ndarray, weight: int) -> None:
            piece_ids = self.tokenizer.encode(piece).ids if isinstance(piece, str) else piece.tolist()
            ids.extend(piece_ids)
            weights.extend([weight] * len(piece_ids))

        noun, key, lead = rng.choice(NOUNS), rng.choice(KEYS), rng.choice(LEADS) if form.stop else ""
        names, words = (rng.choice(pool, (2, num_facts), replace=False) for pool in (self.names, self.words))
        keys = [key.format(*parts) for parts in zip(*names, *words, strict=True)]
        values = ["".join(map(str, rng.integers(0, 10, digits))) or rng.choice(self.words) for _ in keys]
        facts = [form.statement.format(noun=noun, key=k) + f" {v}" for k, v in zip(keys, values, strict=True)]
        space = " " if form.stop and rng.random() < 0.3 else "\n"
        # A line end belongs to the full stop before it, a space to the word behind it: pieces are cut where tokens are.
        goes_on = space == " " and not gaps[0]
        add(form.opening + lead + f"{form.stop}{space}".join(facts) + form.stop + ("" if goes_on else "\n"), 0)
        asked = rng.permutation(num_facts)[: len(gaps)]
        for index, (fact, gap) in enumerate(zip(asked, gaps, strict=True)):
            add(form.ask_open if index else "", 0)
            if gap:
                add(self.filler(rng, gap), 1)
                add("\n", 0)
            ask = form.ask.format(noun=noun, key=keys[fact])
            add(f" {ask}" if goes_on and not index else ask, 0)
            add(form.reply.format(noun=noun, key=keys[fact]), 1 if form.ask else 0)
            add(f" {values[fact]}", ANSWER_WEIGHT)
            add(form.reply_stop, 1)
        return ids, weights

    def window(self, rng: np.random.Generator, length: int, reach: int) -> tuple[list[int], list[int]]:
        """Documents one after another, cut at `length` tokens, whose questions come up to `reach` tokens late."""
        ids: list[int] = []
        weights: list[int] = []
        while len(ids) < length:
            num_facts = int(rng.integers(1, 17))
            late = rng.random(num_facts) < 0.15
            gaps = [int(rng.integers(0, reach // 3 + 1)) if is_late else 0 for is_late in late]
            gaps[0] = int(rng.integers(0, reach + 1))
            form = FORMS[rng.choice(("prose", "prose", "lines", "chat", "chat"))]
            more_ids, more_weights = self.document(rng, form, num_facts, gaps, digits=int(rng.choice(DIGITS)))
            ids += [*more_ids, self.tokenizer.token_to_id(END_OF_TEXT)]
            weights += [*more_weights, 1]
        return ids[:length], weights[:length]

    def exam(self, length: int, count: int) -> list[dict]:
        """Documents of about `length` tokens, prose and chat in turn: facts first, then a novel, then one question."""
        rows = []
        for index in range(count):
            name = ("prose", "chat")[index % 2]
            question = 5 + len(self.tokenizer.encode(FORMS[name].reply_stop).ids)
            bare, full = (np.random.default_rng((SEED, length, index)) for _ in range(2))
            overhead = len(self.document(bare, FORMS[name], 6, [0], digits=4)[0]) - question + 1
            ids, _ = self.document(full, FORMS[name], 6, [length - overhead], digits=4)
            prompt = self.tokenizer.decode(ids[:-question], skip_special_tokens=False)
            answer = self.tokenizer.decode(ids[-question : 5 - question])
            rows.append({"length": length, "form": name, "prompt": prompt, "answer": answer})
        return rows


def frequent(pattern: re.Pattern, texts: list[str], count: int) -> list[str]:
    """The strings that the pattern finds most often, without words that open questions."""
    found = Counter(match for text in texts for match in pattern.findall(text) if not match.startswith(("Wh", "How")))
    return [match for match, _ in found.most_common(count)]


def read_streams(tokenizer: Tokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    """Tokens of the novels, and of chats cut out of them."""
    return {
        "novels": token_stream(tokenizer, texts),
        "chat": token_stream(tokenizer, chats(texts, np.random.default_rng(SEED))),
    }


class Windows(Dataset):
    """Batch `step` of the training run: tokens and loss weights, both [batch, context + 1].

    Each batch is drawn from a generator seeded with its step, so that the number of workers changes nothing.
    """

    def __init__(self, streams: dict[str, np.ndarray], retrieval: Retrieval, options: argparse.Namespace):
        self.streams, self.retrieval, self.options = streams, retrieval, options

    def __len__(self) -> int:
        return self.options.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((SEED, step))
        length = CONTEXT + 1
        tokens = np.empty((self.options.batch, length), dtype=np.int16)
        weights = np.ones((self.options.batch, length), dtype=np.uint8)
        # Short distances first: an eighth of the run learns to copy at all, then questions move away from their facts.
        progress = step / self.options.steps
        reach = int(np.clip((progress - 0.125) * 4, 0, 1) * 1850)
        retrieval_share = 0.2 if reach else 0.6
        for row, draw in enumerate(rng.random(self.options.batch)):
            if draw < retrieval_share:
                tokens[row], weights[row] = self.retrieval.window(rng, length, reach)
            else:
                stream = self.streams["chat" if draw > 0.88 else "novels"]
                start = rng.integers(0, len(stream) - length)
                tokens[row] = stream[start : start + length]
        return torch.from_numpy(tokens), torch.from_numpy(weights)
