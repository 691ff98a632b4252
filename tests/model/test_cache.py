"""A cache keeps each row's keys and values, whoever leaves, joins or grows."""

from random import Random
from sys import getrefcount
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_core.errors import ConfigError
from layerskip_core.model.cache import Places
from layerskip_core.model.pages import PAGE, PagedCache, PagePool
from layerskip_core.model.row_cache import RowCache, SpanWriter
from layerskip_core.processor import available_memory

LAYERS = 2
HEADS = 2
SIZE = 4
CONTEXT = 512
LIKE = torch.empty(0)


class Rows:
    """Of a RowCache."""

    def new(self, count):
        return RowCache((LAYERS, HEADS, SIZE), count, CONTEXT, LIKE)

    def write(self, cache, row, start, numbers):
        stop = SpanWriter(cache, torch.tensor([[start + numbers.shape[3] - 1]] * cache.rows)).end
        with torch.inference_mode():
            cache.reach(stop)[:, :, row, :, start:stop] = numbers

    def read(self, cache, row, stop):
        return cache.storage[:, :, row, :, :stop]


class Pages:
    """Of a PagedCache. A page is written only by the row that has it alone."""

    window = None

    def __init__(self):
        self.pool = PagePool([(HEADS, SIZE)] * LAYERS, torch.float32, window=self.window)

    def new(self, count):
        return PagedCache(self.pool, count, CONTEXT)

    def write(self, cache, row, start, numbers):
        stop = start + numbers.shape[3]
        cache.addresses(
            Places(
                cache,
                [start] * cache.rows,
                [(each == row) * (stop - start) for each in range(cache.rows)],
            )
        )
        pages = cache._pages[row]
        for place in range(start, stop):
            page = pages[place // PAGE]
            assert getrefcount(page) == 3  # the list, the name and the argument
            with torch.inference_mode():
                page.content.view(LAYERS, 2, HEADS, PAGE, SIZE)[:, :, :, place % PAGE] = numbers[
                    :, :, :, place - start
                ]

    def read(self, cache, row, stop):
        pages = [page.content.view(LAYERS, 2, HEADS, PAGE, SIZE) for page in cache._pages[row]]
        return torch.cat(pages, dim=3)[..., :stop, :]


class Windowed(Pages):
    """Of which a token sees the last 100. What no token will see again is no part of what is
    read.
    """

    window = 100

    def read(self, cache, row, stop):
        forgotten = cache._pages[row].count(self.pool.nowhere)
        assert (
            len(cache._pages[row]) - forgotten <= (self.window + cache.steps_back + 150) // PAGE + 3
        )  # 150 in a pass
        return super().read(cache, row, stop)


@pytest.mark.parametrize("kind", [Rows, Pages, Windowed])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_rows_keep_their_numbers(kind, seed):
    """Whoever leaves, joins, goes on from an earlier position or begins as another does, in a cache
    or in one that branches.

    A row is its numbers, and the position from which it may still write; with a window the numbers
    that may still be seen.
    """
    random = Random(seed)
    memory = kind()
    generator = torch.Generator().manual_seed(seed)

    def grown(cache, rows, row):
        """With new numbers from a position on."""
        numbers, least = rows[row]
        start = random.randint(
            max(least, first(cache, row), numbers.shape[3] - 70), numbers.shape[3]
        )
        new = torch.rand(
            LAYERS,
            2,
            HEADS,
            min(random.randint(1, 150), CONTEXT - start),
            SIZE,
            generator=generator,
        )
        if new.shape[3]:
            memory.write(cache, row, start, new)
        return torch.cat([numbers[..., :start, :], new], dim=3), least

    def first(cache, row):
        return 0 if kind is Rows else cache.first(row)

    def fresh():
        cache = memory.new(1)
        rows = [(torch.zeros(LAYERS, 2, HEADS, 0, SIZE), 0)]
        return cache, [grown(cache, rows, 0)]

    caches = [fresh()]
    for _ in range(30):
        index = random.randrange(len(caches))
        cache, rows = caches[index]
        action = random.choice(["join", "leave", "grow", "grow", "branch", "forget"])
        if action == "join" and len(rows) < 6:
            other, added = fresh()
            cache.join(other)
            rows += added
        elif action == "leave":
            kept = random.sample(range(len(rows)), random.randint(0, len(rows)))
            cache.keep_rows(kept)
            rows[:] = [rows[row] for row in kept]
        elif action == "grow" and rows:
            row = random.randrange(len(rows))
            rows[row] = grown(cache, rows, row)
        elif action == "branch" and rows and len(caches) < 6:
            chosen = [random.randrange(len(rows)) for _ in range(random.randint(1, 3))]
            stops = [
                random.randint(max(1, first(cache, row)), rows[row][0].shape[3]) for row in chosen
            ]
            starts = [
                random.randint(max(first(cache, row), stop - 5), stop)
                for row, stop in zip(chosen, stops, strict=True)
            ]
            taken = list(zip(chosen, starts, stops, strict=True))
            branched = [(rows[row][0][..., :stop, :], start) for row, start, stop in taken]
            caches.append((cache.branch(chosen, starts, stops), branched))
            for row, start, _ in taken:
                rows[row] = rows[row][0], max(rows[row][1], start)
        elif action == "forget" and len(caches) > 1:
            del caches[index]
        for each, known in caches:
            assert each.rows == len(known)
            for row, (numbers, _) in enumerate(known):
                least = max(0, first(each, row) - (kind is Windowed and memory.window - 1))
                found = memory.read(each, row, numbers.shape[3])
                assert torch.equal(found[..., least:, :], numbers[..., least:, :])
    cache = other = None
    if kind is not Rows:
        held = {page for each, _ in caches for pages in each._pages for page in pages} - {
            memory.pool.nowhere
        }
        assert memory.pool.used == len(held)


@pytest.mark.parametrize(
    "prompt, end, moves", [(20, 270, 1), (1000, 1500, 1), (20, 3000, 6), (20, 131_072, 6)]
)
def test_a_text_that_grows_moves_seldom(monkeypatch, prompt, end, moves):
    """At once to an end that is near, else by half: to 320, 640, 1024, 1600, 2432 and 3712, or to
    the end.
    """
    moved = []
    hold = RowCache._hold

    def counted(cache, storage):
        moved.append(cache.capacity)
        return hold(cache, storage)

    cache = RowCache((LAYERS, HEADS, SIZE), 1, end, LIKE)
    monkeypatch.setattr(RowCache, "_hold", counted)
    for stop in range(prompt, min(end, 3000) + 1):
        cache.reach(SpanWriter(cache, torch.tensor([[stop - 1]])).end)
        assert stop <= cache.capacity <= min(end, max(stop + 256, 1.5 * stop)) + 63
        _, keys, values = cache.matrices(slice(None))[-1]  # read as a whole
        assert stop <= keys.shape[2] == values.shape[1] <= stop + 63
    assert len(moved) == moves and sum(moved) <= 2 * cache.capacity


def test_pages_are_given_back_and_taken_again():
    """Without a row there is no page, and as many rows again take no more memory."""
    pool = PagePool([(HEADS, SIZE)] * LAYERS, torch.float32)

    def texts(count):
        cache = PagedCache(pool, count, CONTEXT)
        cache.addresses(cache.span(CONTEXT - 1, CONTEXT))
        return cache

    held = texts(20)
    assert pool.used == 20 * CONTEXT // PAGE
    slabs = sum(len(slab.pages) for slab in pool._slabs)
    assert slabs <= 2 * pool.used
    del held
    assert pool.used == 0
    for _ in range(3):
        held = texts(20)
        assert (
            pool.used == 20 * CONTEXT // PAGE
            and sum(len(slab.pages) for slab in pool._slabs) <= slabs
        )
        del held


def test_a_prefix_shares_all_pages_but_the_last():
    pool = PagePool([(HEADS, SIZE)] * LAYERS, torch.float32)
    cache = PagedCache(pool, 1, CONTEXT)
    cache.addresses(cache.span(200, 201))
    branches = [cache.branch([0], [200]) for _ in range(5)]
    assert pool.used == 4 + 5 and len({*branches[0].memory} & {*branches[1].memory}) == 3
    with pytest.raises(
        ConfigError, match="the context limit of 512 tokens is reached: position 512 was requested"
    ):
        branches[0].span(512, 513)


V1 = ("limit_in_bytes", "usage_in_bytes", "total_")
V2 = ("max", "current", "")


@pytest.mark.parametrize(
    "listed, folder, names, limit, expected",
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
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(total=9000, available=1000)
    )
    group, (limited, used, prefix) = tmp_path / "sys/fs/cgroup" / folder, names
    group.mkdir(parents=True)
    (group / f"memory.{limited}").write_text(f"{limit}\n")
    (group / f"memory.{used}").write_text("200\n")
    (group / "memory.stat").write_text(
        f"anon 160\n{prefix}inactive_file 30\n{prefix}active_file 10\nslab 7\n"
    )
    if listed is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{listed}\n")
    assert available_memory(tmp_path) == expected
