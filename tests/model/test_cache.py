"""The cache keeps each row's keys and values, whoever leaves, joins or grows."""

from random import Random
from types import SimpleNamespace

import pytest
import torch

from layerskip_core.model.cache import KVCache, available_memory

LAYERS, HEADS, SIZE, CONTEXT = 2, 2, 4, 512
LIKE = torch.empty(0)


def reader_of(cache, scatters, stop):
    """A function from a row to its part of the storage, (L, 2, kv heads, capacity, head dim), to be written before `stop`."""
    stop = cache.writer(torch.tensor([[stop - 1]])).stop
    if scatters:
        storage = cache.scattered(stop, HEADS, SIZE, LIKE)
        return lambda row: storage[:, :, cache.slots[row]]
    storage = cache.room(stop, HEADS, SIZE, LIKE)
    assert storage.shape[2] == cache.rows
    return lambda row: storage[:, :, row]


def filled(random, lengths, scatters):
    """A cache with random contents, and what each row has."""
    cache = KVCache(LAYERS, len(lengths), CONTEXT)
    part, expected = reader_of(cache, scatters, max(lengths)), []
    for row, length in enumerate(lengths):
        numbers = torch.rand(LAYERS, 2, HEADS, length, SIZE, generator=torch.Generator().manual_seed(random.getrandbits(32)))
        part(row)[..., :length, :] = numbers
        expected.append(numbers)
    return cache, expected


@pytest.mark.parametrize("readers", ["scattered", "room", "both"])
@pytest.mark.parametrize("seed", range(12))
def test_rows_keep_their_numbers(readers, seed):
    random = Random(seed)

    def scatters():
        return readers == "scattered" or (readers == "both" and random.random() < 0.5)

    cache, expected = filled(random, [random.randint(1, 150) for _ in range(random.randint(1, 5))], scatters())
    for _ in range(30):
        action = random.choice(["leave", "leave", "join", "grow", "reorder"])
        rows = list(range(len(expected)))
        if action == "leave" and len(rows) > 1:
            rows = sorted(random.sample(rows, random.randint(1, len(rows))))
        elif action == "reorder":
            rows = [random.choice(rows) for _ in range(random.randint(1, 4))]
        elif action == "join" and len(rows) < 12:
            other, added = filled(random, [random.randint(1, 150) for _ in range(random.randint(1, 3))], scatters())
            kept = sorted(random.sample(range(len(added)), random.randint(1, len(added))))
            other.keep_rows(kept)
            cache.join(other)
            expected += [added[row] for row in kept]
            rows = list(range(len(expected)))
        if rows != list(range(cache.rows)):
            cache.keep_rows(rows)
        expected = [expected[row] for row in rows]
        stop = random.randint(1, 400) if action == "grow" else 1
        part = reader_of(cache, scatters(), max(stop, *(numbers.shape[3] for numbers in expected)))
        assert cache.capacity >= stop
        assert cache.rows == len(expected)
        for row, numbers in enumerate(expected):
            assert torch.equal(part(row)[..., : numbers.shape[3], :], numbers)


def test_what_copies_nothing():
    """A row that leaves, and one that joins where a slot is free."""
    random = Random(1)
    cache, _ = filled(random, [20, 30, 40], scatters=True)
    storage = cache.scattered(1, HEADS, SIZE, LIKE)
    cache.keep_rows([0, 2])
    cache.join(filled(random, [33], scatters=True)[0])
    assert cache.scattered(1, HEADS, SIZE, LIKE) is storage
    assert cache.slots.tolist() == [0, 2, 1]


V1, V2 = ("limit_in_bytes", "usage_in_bytes", "total_"), ("max", "current", "")


@pytest.mark.parametrize(
    ("listed", "folder", "names", "limit", "expected"),
    [
        (None, "", V2, 500, 1000),  # another system
        ("0::/user/run", "user/run", V2, 500, 340),
        ("0::/user/run", "user", V2, 500, 340),  # a limit on a group above
        ("0::/", "", V2, 500, 340),
        ("0::/docker/4f", "", V2, 500, 340),  # a container that sees its own group alone
        ("0::/", "", V2, "max", 1000),
        ("0::/", "", V2, 5000, 1000),  # no more than the machine has
        ("9:cpu:/\n4:memory:/docker/4f\n0::/", "memory/docker/4f", V1, 500, 340),
        ("4:memory:/docker/4f", "memory", V1, 500, 340),
        ("4:memory:/", "memory", V1, 2**63 - 4096, 1000),
    ],
)
def test_the_memory_available_is_the_machines_within_the_limits_of_cgroups(
    tmp_path, monkeypatch, listed, folder, names, limit, expected
):
    """200 bytes are used, of which 40 by cached files."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=9000, available=1000))
    group, (limited, used, prefix) = tmp_path / "sys/fs/cgroup" / folder, names
    group.mkdir(parents=True)
    (group / f"memory.{limited}").write_text(f"{limit}\n")
    (group / f"memory.{used}").write_text("200\n")
    (group / "memory.stat").write_text(f"anon 160\n{prefix}inactive_file 30\n{prefix}active_file 10\nslab 7\n")
    if listed is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{listed}\n")
    assert available_memory(tmp_path) == expected


@pytest.mark.parametrize("scatters", [True, False])
@pytest.mark.parametrize(("prompt", "end", "moves"), [(20, 270, 1), (1000, 1500, 1), (20, 3000, 6), (20, 131_072, 6)])
def test_a_text_that_grows_moves_seldom(monkeypatch, scatters, prompt, end, moves):
    """At once to an end that is near, else by half: to 320, 640, 1024, 1600, 2432 and 3712, or to the end."""
    copied, move = [], KVCache._move

    def counted(cache, held, *arguments):
        copied.append(held.shape[4])
        return move(cache, held, *arguments)

    monkeypatch.setattr(KVCache, "_move", counted)
    cache = KVCache(LAYERS, 1, end)
    for stop in range(prompt, min(end, 3000) + 1):
        reader_of(cache, scatters, stop)
        assert stop <= cache.capacity <= min(end, max(stop + 256, 1.5 * stop)) + 63
        _, keys, values = cache.matrices()[-1]  # read as a whole
        assert stop <= keys.shape[2] == values.shape[1] <= stop + 63
    assert len(copied) == moves and sum(copied) <= 2 * cache.capacity


@pytest.mark.parametrize("scatters", [True, False])
def test_slots_are_as_many_as_rows_need(scatters):
    """Longer and longer rows that come and go beside one get no more of them; after many rows at once they shrink."""
    random = Random(2)
    cache, [numbers] = filled(random, [20], scatters)

    def join_and_leave(*lengths):
        other, added = filled(random, lengths, scatters)
        cache.join(other)
        part = reader_of(cache, scatters, max(lengths))
        for row, each in enumerate((numbers, *added)):
            assert torch.equal(part(row)[..., : each.shape[3], :], each)
        slots = cache.storages[0].shape[2]
        cache.keep_rows([0])
        reader_of(cache, scatters, 1)
        return slots

    assert {join_and_leave(length) for length in range(70, 512, 64)} == {2}
    assert 9 <= join_and_leave(*[30] * 8) <= 18
    assert cache.storages[0].shape[2] == 1 and join_and_leave(30) == 2
