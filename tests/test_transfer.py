"""KV from one process to another: what arrives is what was sent, and what should not arrive costs one sequence."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.errors import ConfigError, UnsupportedError
from kvtool.kv import receiver as receiving
from kvtool.kv import sender as sending
from kvtool.kv import transfer, wire
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.channels import SocketChannel
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.packer import Packer
from kvtool.kv.receiver import Arrival, Loss, Receiver
from kvtool.kv.sender import Sender
from kvtool.kv.shares import Share
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.kv.transfer import Route
from kvtool.kv.wire import Close, Identity, Refusal, TransferError
from kvtool.parallel import Group

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SPEC = KVSpec(3, StreamSpec(2, 32), StreamSpec(2, 32), 4)
FORMATS = {
    "16": KVOptions(),
    "4": KVOptions(nbits="4"),
    "2, window": KVOptions(nbits="2"),
    "fp8": KVOptions(nbits="fp8"),
    "mixed": KVOptions(layer_bits=(("8", "4"), ("4", "2"), ("16", "16"))),
}
SECRET = b"only we know"
TOKENS = [(7 * i) % 199 for i in range(300)]
NOTHING = Close(5, 64, 1.0, 2.0, b"")


def layout(name: str) -> KVLayout:
    return KVLayout(SPEC, resolve(FORMATS[name], SPEC))


def store(name: str, seed: int = 0, device: str = "cpu") -> KVStore:
    """Of 12 blocks and 3 tails, full of noise."""
    made = KVStore(layout(name), 12, 3, torch.float32, device)
    generator = torch.Generator().manual_seed(seed)
    for memory in (made.blocks, made.tails):
        memory.copy_(torch.randint(0, 256, memory.shape, generator=generator, dtype=torch.uint8))
    return made


def identity(name: str, model: str = "m") -> Identity:
    return Identity.of(model, layout(name), torch.float32)


def receiver(name: str, secret: bytes = SECRET, model: str = "m", **settings: object) -> Receiver:
    return Receiver(layout(name), identity(name, model), secret, **settings)  # type: ignore[arg-type]


def push_all(sender: Sender, name: str, source: KVStore, request_id: str, by_layer: bool) -> None:
    """Send TOKENS from blocks 11, 10, … and slot 2, in two steps."""
    push = sender.begin(request_id, TOKENS)
    count = layout(name).format.num_blocks(len(TOKENS))
    blocks = list(range(11, 11 - count, -1))
    for end in (count // 2, count):
        for layer in range(3) if by_layer else ():
            push.put_blocks(range(layer, layer + 1), end, source, blocks)
        push.put_blocks(range(3), end, source, blocks)
    push.put_tail(source.tail(2))
    push.close(NOTHING)


def be_sender(port: int, name: str, asked: str, ids: list[str], device: str = "cpu") -> None:
    """A process that pushes the same sequence under several ids."""
    torch.set_num_threads(1)
    source = store(name, device=device)
    dial = lambda: transfer.dial_tcp("127.0.0.1", port)  # noqa: E731
    sender = Sender("receiver", dial, layout(name), identity(name), SECRET, asked=asked, device=device)
    sender.connect(20)
    for index, request_id in enumerate(ids):
        push_all(sender, name, source, request_id, by_layer=index % 2 == 0)
    sender.close()


def events(tested: Receiver, count: int, seconds: float = 60) -> list[Arrival | Loss]:
    found: list[Arrival | Loss] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += tested.take()
        time.sleep(0.005)
    return found


def assert_holds(arrival: Arrival, name: str) -> None:
    """It is what `push_all` sends, wherever it is put."""
    source, target = store(name), store(name, seed=1)
    count = layout(name).format.num_blocks(len(TOKENS))
    blocks = [3, 9, 1, 0, 7, 2, 5, 4, 6][:count]
    arrival.staged.store_in(target, blocks[1:], 1)  # the first is there already
    sent = source.gather_blocks(list(range(11, 11 - count, -1)))
    assert torch.equal(target.gather_blocks(blocks[1:]), sent[1:])
    assert torch.equal(target.tail(1), source.tail(2))
    others = [block for block in range(12) if block not in blocks[1:]]
    assert torch.equal(target.gather_blocks(others), store(name, seed=1).gather_blocks(others))


@contextmanager
def listening(tested: Receiver) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tested.listen(listener)
        yield listener.getsockname()[1]
        tested.close()


@pytest.mark.parametrize(("name", "asked"), [("4", "auto"), ("2, window", "gloo"), ("mixed", "nixl")])
def test_what_another_process_sends_arrives_bit_for_bit(name, asked):
    if asked == "nixl":
        pytest.importorskip("nixl")
    assert_all_arrive(receiver(name), name, asked)


def assert_all_arrive(tested: Receiver, name: str, asked: str, *device: str) -> None:
    """What a process sends, from its memory or a GPU's."""
    ids = ["a", "b", "c", "d"]
    for request_id in ids:
        tested.expect(request_id, TOKENS, 60)
    with listening(tested) as port, process_of(be_sender, port, name, asked, ids, *device) as process:
        arrivals = events(tested, 4, 45)
        process.join(20)
        assert process.exitcode == 0
    assert sorted(arrival.id for arrival in arrivals) == ids
    predicted = layout(name).bytes_for([len(TOKENS)])
    for arrival in arrivals:
        assert isinstance(arrival, Arrival)
        assert_holds(arrival, name)
        assert predicted < arrival.nbytes < predicted + 4096
        assert (arrival.close.first_token, arrival.close.num_cached_tokens) == (5, 64)


@TWO_GPUS
@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("name", ["16", "mixed"])
def test_what_travels_between_two_gpus_arrives_bit_for_bit(name):
    assert_all_arrive(receiver(name, device="cuda:0"), name, "nccl", "cuda:1")


@TWO_GPUS
@pytest.mark.timeout(60, method="thread")
def test_a_sender_that_dies_between_two_gpus_costs_its_sequence_at_once():
    """NCCL itself would wait for what has been announced."""
    tested = receiver("4", device="cuda:0")
    tested.expect("a", TOKENS, 300)
    with listening(tested) as port, process_of(announce_and_die, port):
        (loss,) = events(tested, 1, 45)
    assert isinstance(loss, Loss) and "in time" not in loss.reason


def announce_and_die(port: int) -> None:
    dial = lambda: transfer.dial_tcp("127.0.0.1", port)  # noqa: E731
    sender = Sender("receiver", dial, layout("4"), identity("4"), SECRET, asked="nccl", device="cuda:1")
    session = sender._link().session
    session.say(opening())
    session.hear(wire.Accepted)
    session.say(WHOLE)
    time.sleep(1)  # the other end's GPU waits by now
    os._exit(1)


@contextmanager
def process_of(target: Callable[..., None], *args: object) -> Iterator[multiprocessing.Process]:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    try:
        yield process  # type: ignore[misc]
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("part_bytes", [1, 40_000, 1 << 20])
@pytest.mark.parametrize("name", FORMATS)
def test_a_sender_in_the_same_process_needs_no_socket(name, part_bytes, monkeypatch):
    """However many layers it sends at once."""
    monkeypatch.setattr(sending, "PART_BYTES", {"cpu": part_bytes})
    tested = receiver(name)
    sender = Sender("here", tested.attach, layout(name), identity(name), SECRET)
    sender.connect(1)
    assert sender.transfer and sender.transfer.name == "in-process"
    for request_id in "abcdef":
        tested.expect(request_id, TOKENS, 60)
        push_all(sender, name, store(name), request_id, by_layer=request_id in "ace")
    arrivals = events(tested, 6)
    for arrival in arrivals:
        assert isinstance(arrival, Arrival)
        assert_holds(arrival, name)
    sender.close()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_checksum_tells_what_goes_wrong(data):
    sizes = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=3))
    pieces = [torch.randint(0, 256, (8 * size,), dtype=torch.uint8) for size in sizes]
    before = checksum([pieces])
    assert checksum([[piece.clone().view(-1, 8) for piece in pieces]]) == before
    cut = 8192 * data.draw(st.integers(0, 2))
    assert checksum([[pieces[0][:cut]], [pieces[0][cut:], *pieces[1:]]]) == before, "in portions of whole rows"
    piece = data.draw(st.sampled_from(pieces))
    at = data.draw(st.integers(0, len(piece) - 1))
    piece[at] ^= data.draw(st.integers(1, 255))
    assert checksum([pieces]) != before


def checksum(portions: list[list[torch.Tensor]]) -> bytes:
    total = wire.Checksum()
    for portion in portions:
        total.add(portion)
    return total.digest()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(FORMATS)), heads=st.sampled_from([1, 2, 4]), size=st.sampled_from([1, 2, 4]))
def test_shares_are_what_ranks_with_these_heads_store(name, heads, size):
    """Of blocks and tails; put together they are the whole again."""
    spec = KVSpec(3, StreamSpec(heads, 32), StreamSpec(heads, 64), 4)
    fmt = resolve(FORMATS[name], spec)
    whole = filled(KVLayout(spec, fmt), range(heads))
    together = [torch.zeros(2, whole.layout.layer_block_bytes(layer), dtype=torch.uint8) for layer in range(3)]
    tail = torch.zeros(whole.layout.tail_bytes, dtype=torch.uint8)
    for rank in range(size):
        mine = Group(rank, size).shard(heads)
        own = KVSpec(3, StreamSpec(mine.size, 32), StreamSpec(mine.size, 64), 4)
        rank_store = filled(KVLayout(own, fmt), range(mine.start, mine.start + mine.size))
        share = Share(whole.layout, rank_store.layout, (mine.start, mine.start))
        for layer in range(3):
            part, all_heads = layer_blocks(rank_store, layer), layer_blocks(whole, layer)
            assert torch.equal(share.of_blocks(layer, all_heads), part)
            share.into_blocks(layer, part, together[layer])
        assert torch.equal(share.of_tail(whole.tail(0)), rank_store.tail(0))
        share.into_tail(rank_store.tail(0), tail)
    assert torch.equal(torch.cat(together, dim=1), whole.gather_blocks([0, 1]))
    assert torch.equal(tail, whole.tail(0))


def filled(of: KVLayout, heads: range) -> KVStore:
    """What a store holds of two blocks and a tail of tokens that are random, but for each head the same ones."""
    made, num_tokens = KVStore(of, 2, 1, torch.float32), 2 * of.format.block_size
    batch = KVBatch.build(of.format, [Span(0, num_tokens, [0, 1], 0)], torch.device("cpu"))

    def noise(dim: int, layer: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(9 * layer + head) for head in heads]
        return torch.stack([torch.randn(num_tokens, dim, generator=generator) for generator in generators], 1)

    for index, layer in enumerate(made.layers):
        layer.write(noise(32, index), noise(64, index), batch)
    return made


def layer_blocks(of: KVStore, layer: int) -> torch.Tensor:
    out = torch.empty(2, of.layout.layer_block_bytes(layer), dtype=torch.uint8)
    of.gather_layer(layer, torch.arange(2), out)
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "16"])
def test_what_is_packed_on_the_way_is_what_would_have_been_stored(name, block_size, device):
    """In two steps of a prompt, from 16-bit blocks of any size."""
    exact, packed = KVLayout(SPEC, resolve(KVOptions(), SPEC, block_size)), layout(name)
    fmt, count = packed.format, len(TOKENS)
    source, target = (KVStore(of, 12, 2, torch.float32, device) for of in (exact, packed))
    blocks = [11, 3, 5, 0, 1, 7, 9, 2, 4, 10]
    for seed, (one, two) in enumerate(zip(source.layers, target.layers, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        key, value = (torch.randn(count, 2, 32, generator=generator).to(device) for _ in range(2))
        for of, kv in ((source, one), (target, two)):
            owned = blocks[: of.format.num_blocks(count)]
            kv.write(key, value, KVBatch.build(of.format, [Span(0, count, owned, 1)], torch.device(device)))
    packer = Packer(exact, packed, torch.float32, torch.device(device))
    half = fmt.packed_tokens(170) // fmt.block_size
    tail = torch.full((packed.tail_bytes,), 7, dtype=torch.uint8, device=device)
    for layer in range(3):
        for first, end, end_token in ((0, half, half * fmt.block_size), (half, fmt.num_blocks(count), count)):
            room, sources = packer.room(layer, first, end_token), packer.sources(first, end_token)
            source.gather_layer(layer, source.index(blocks[sources.start : sources.stop]), room)
            out = torch.empty(end - first, packed.layer_block_bytes(layer), dtype=torch.uint8, device=device)
            packer.pack(layer, room, first, end_token, out)
            stored = torch.empty_like(out)
            target.gather_layer(layer, target.index(blocks[first:end]), stored)
            assert torch.equal(out, stored)
        if packed.tail_bytes:
            packer.write_tail(layer, room, half, count, tail)
    assert not packer.take_fault().item()
    if packed.tail_bytes:
        rows = [position % fmt.tail_tokens for position in range(fmt.packed_tokens(count), count)]
        got, stored = (
            x.view(torch.float32).view(6, 2, fmt.tail_tokens, 32)[:, :, rows] for x in (tail, target.tail(1))
        )
        assert torch.equal(got, stored)


def test_tables_say_why_a_transfer_is_refused():
    assert transfer.select(Route("cpu", "cpu", True)).name == "in-process"
    assert transfer.select(Route("cpu", "cpu", False)).name == "tcp"
    assert transfer.select(Route("cpu", "cpu", False), "gloo").name == "gloo"
    with pytest.raises(UnsupportedError, match="nccl: it moves memory of GPUs, and an end is on a CPU"):
        transfer.select(Route("cpu", "cuda", False), "nccl")
    with pytest.raises(UnsupportedError, match="gloo: the peer does not take it"):
        transfer.select(Route("cpu", "cpu", False), "gloo", ["tcp"])
    with pytest.raises(UnsupportedError, match="must be one of auto, in-process"):
        transfer.select(Route("cpu", "cpu", False), "pigeon")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"secret": b"another"}, "another --kv-secret"),
        ({"model": "other"}, r"it has another model \(other, here "),
        ({"model": "m w8a8"}, "it keeps the model's weights otherwise"),
        ({"name": "2, window"}, "its KV format is K 2 bits"),
        ({"name": "16"}, "its KV format is K and V at the model's precision"),
    ],
)
def test_peers_that_do_not_fit_part_at_once(settings, says):
    tested = receiver(**{"name": "4"} | settings)
    sender = Sender("h:1", tested.attach, layout("4"), identity("4"), SECRET)
    with pytest.raises(TransferError, match=rf"--peer h:1: .*{says}") as caught:
        sender.connect(1)
    assert "\n" not in str(caught.value)


def test_peers_of_different_versions_part_at_once(monkeypatch):
    tested = receiver("4")
    channel = tested.attach()
    channel.send_frame(msgspec.msgpack.encode(wire.Hello(2, b"n" * 32)))
    with pytest.raises(TransferError, match="version 3 of kvtool's transfer; here it is 2"):
        wire.decoded(channel.receive_frame(), wire.Welcome)


def test_nobody_at_the_other_end_is_an_error_within_its_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    sender = Sender("127.0.0.1:9", lambda: transfer.dial_tcp("127.0.0.1", port), layout("4"), identity("4"), SECRET)
    started = time.monotonic()
    with pytest.raises(Exception, match=r"--peer 127\.0\.0\.1:9: no decode side answers there"):
        sender.connect(0.5)
    assert time.monotonic() - started < 10


def test_something_else_at_the_other_end_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(transfer, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dial = lambda: transfer.dial_tcp(*listener.getsockname())  # noqa: E731
        sender = Sender("127.0.0.1:9", dial, layout("4"), identity("4"), SECRET)
        with pytest.raises(ConfigError, match=r"no decode side answers there \(it says nothing; tried for 0.1 s\)"):
            sender.connect(0.1)


@pytest.fixture
def link() -> Iterator[tuple[Receiver, wire.Session]]:
    """A receiver that expects "a", and a session of a sender who can be of ill will."""
    tested = receiver("4")
    tested.expect("a", TOKENS, 60)
    sender = Sender("r", tested.attach, layout("4"), identity("4"), SECRET)
    yield tested, sender._link().session
    tested.close()


def opening(**changes: object) -> wire.Open:
    of = layout("4")
    count = of.format.num_blocks(len(TOKENS))
    right = wire.Open("a", wire.token_hash(TOKENS), len(TOKENS), count, of.block_bytes, of.tail_bytes)
    return msgspec.structs.replace(right, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": "b"}, "an unknown request"),
        ({"tokens": b"x" * 32}, "other tokens"),
        ({"num_tokens": 1 << 40, "num_blocks": 1 << 34}, "but should be"),
        ({"block_bytes": 16}, "but should be"),
        ({"tail_bytes": 0}, "but should be"),
    ],
)
def test_an_opening_that_is_not_expected_is_refused_and_the_next_is_taken(link, changes, says, monkeypatch, caplog):
    monkeypatch.setattr(receiving, "REGISTER_SECONDS", 0.05)
    _, session = link
    session.say(opening(**changes))
    with pytest.raises(Refusal, match=says):
        session.hear(wire.Accepted)
    assert says in caplog.text
    session.say(opening())
    session.hear(wire.Accepted)


def test_a_sequence_comes_once(link, monkeypatch):
    monkeypatch.setattr(receiving, "REGISTER_SECONDS", 0.05)
    tested, _ = link
    sender = Sender("r", tested.attach, layout("4"), identity("4"), SECRET)
    sender.connect(1)
    for _ in range(2):
        push_all(sender, "4", store("4"), "a", by_layer=False)
    sender.close()
    assert [type(event) for event in tested.take()] == [Arrival]


NUM_BLOCKS = layout("4").format.num_blocks(len(TOKENS))
ALL = [torch.full((NUM_BLOCKS * layout("4").block_bytes,), 3, dtype=torch.uint8)]
TAIL = [torch.full((layout("4").tail_bytes,), 4, dtype=torch.uint8)]
WHOLE = wire.Part(0, 3, 0, NUM_BLOCKS)


def closing(*pieces: torch.Tensor) -> Close:
    return msgspec.structs.replace(NOTHING, checksum=checksum([[piece] for piece in pieces]))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([(wire.Part(0, 1, 1, 2), ())], "not the next"),
        ([(wire.Part(0, 4, 0, 1), ())], "not the next"),
        ([(wire.Part(0, 1, 0, 1000), ())], "not the next"),
        ([(wire.Part(-1, 1, 0, 1), ())], "not the next"),
        ([(wire.Part(1, 1, 0, 1), ())], "not the next"),
        ([(WHOLE, ALL), (WHOLE, ())], "not the next"),
        ([(NOTHING, ())], "parts are missing"),
        ([(WHOLE, ALL), (closing(*ALL), ())], "parts are missing"),
        ([(wire.Tail(), TAIL), (closing(*TAIL), ())], "parts are missing"),
        ([(wire.Tail(), TAIL), (wire.Tail(), ())], "a tail that is not due"),
        ([(WHOLE, ALL), (wire.Tail(), TAIL), (NOTHING, ())], "checksum is wrong"),
        ([(WHOLE, ALL), (wire.Tail(), TAIL), (closing(*TAIL, *ALL), ())], "checksum is wrong"),
        ([(WHOLE, ALL), (wire.Open("a", b"", 1, 1, 1, 1), ())], "out of turn"),
    ],
)
def test_a_bad_part_costs_its_sequence_and_gives_the_memory_back(link, said, reason):
    tested, session = link
    free = tested.staging.free_bytes
    session.say(opening())
    session.hear(wire.Accepted)
    for message, pieces in said:
        session.send(message, pieces) if pieces else session.say(message)
    (loss,) = events(tested, 1)
    assert isinstance(loss, Loss) and loss.id == "a" and reason in loss.reason
    assert tested.staging.free_bytes == free


@settings(max_examples=20, deadline=None)
@given(at=st.none() | st.integers(0, len(ALL[0]) + len(TAIL[0]) - 1), layers=st.permutations(range(3)))
def test_a_byte_that_changes_on_its_way_is_found_wherever_it_is(at, layers):
    tested, size = receiver("4"), len(ALL[0]) // 3
    tested.expect("a", TOKENS, 60)
    session = Sender("r", tested.attach, layout("4"), identity("4"), SECRET)._link().session
    session.say(opening())
    session.hear(wire.Accepted)
    total, said = wire.Checksum(), [wire.Part(layer, layer + 1, 0, NUM_BLOCKS) for layer in layers]
    for index, message in enumerate([*said, wire.Tail()]):
        pieces = TAIL if message == wire.Tail() else [ALL[0][:size]]
        total.add(pieces)
        sent = pieces[0].clone()
        if at is not None and 0 <= at - index * size < len(sent):
            sent[at - index * size] ^= 64
        session.send(message, [sent])
    session.say(msgspec.structs.replace(NOTHING, checksum=total.digest()))
    (event,) = events(tested, 1)
    assert isinstance(event, Arrival) if at is None else "checksum is wrong" in event.reason
    tested.close()


def test_a_frame_that_is_played_again_ends_the_connection(link):
    tested, session = link
    sent: list[bytes] = []
    original = session.channel.send_frame
    session.channel.send_frame = lambda body: (sent.append(body), original(body))  # type: ignore[method-assign]
    session.say(opening(id="b", tokens=b""))
    with pytest.raises(TransferError):
        session.hear(wire.Accepted)
    original(sent[0])
    with pytest.raises(OSError, match="closed"):
        session.hear(wire.Accepted)
    assert tested.take() == []


def test_what_does_not_come_in_time_is_lost_and_what_breaks_off_too(link):
    tested, session = link
    tested.expect("late", TOKENS, 0.1)
    session.say(opening())
    session.hear(wire.Accepted)
    session.channel.close()
    lost = {event.id: event for event in events(tested, 2)}
    assert isinstance(lost["late"], Loss) and "in time" in lost["late"].reason
    assert isinstance(lost["a"], Loss)


def test_more_than_there_is_room_for_is_refused():
    tested = receiver("4", most_bytes=1000)
    tested.expect("a", TOKENS, 60)
    session = Sender("r", tested.attach, layout("4"), identity("4"), SECRET)._link().session
    session.say(opening())
    with pytest.raises(Refusal, match="no room"):
        session.hear(wire.Accepted)


def test_a_sender_whose_peer_is_slow_holds_no_more_than_it_may():
    tested = receiver("4")
    tested.expect("a", TOKENS, 60)
    sender = Sender("r", tested.attach, layout("4"), identity("4"), SECRET, most_bytes=1000)
    sender.connect(1)
    push_all(sender, "4", store("4"), "a", by_layer=False)
    (loss,) = events(tested, 1)
    assert isinstance(loss, Loss) and "too much waits to be sent" in loss.reason
    sender.close()
    assert sender._staging.free_bytes == 1000


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\0\0\0\0"])
def test_strangers_are_shown_out(data):
    tested = receiver("4")
    with listening(tested) as port, socket.create_connection(("127.0.0.1", port), 10) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
        channel = SocketChannel(socket.create_connection(("127.0.0.1", port), 10))
        wire.greet(channel, SECRET)
        channel.close()
