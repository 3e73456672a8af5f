"""Orders against their definitions: bijections, and what chance would give."""

import math
from collections import Counter

import numpy as np
import pytest

from slm.train.order import ORDERS, Keyed, KeyedRows, Mixed, Order

SIZES = [*range(1, 40), 99, 100, 101, 4095, 4096, 4097, 65537, 1_000_003]
LARGE = 10**9 + 7  # as many windows as no permutation is made of here


def chi2_is_likely(counts: np.ndarray, expected: float) -> bool:
    """Within four standard deviations of the mean of its distribution."""
    freedom = counts.size - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    return abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_a_pass_has_every_window_once(kind, size):
    windows, epochs = Order(size, 7, kind).samples(3 * size, 4 * size)
    assert np.array_equal(np.bincount(windows, minlength=size), np.ones(size))
    assert set(epochs.tolist()) == {3}


@pytest.mark.parametrize("kind", ORDERS)
def test_order_is_a_permutation_each_pass_and_differs_between_passes(kind):
    order = Order(10, 3, kind)
    windows, epochs = order.samples(0, 30)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    passes = windows.reshape(3, 10)
    assert all(sorted(row) == list(range(10)) for row in passes.tolist())
    assert passes[0].tolist() != passes[1].tolist()
    assert not np.array_equal(windows, Order(10, 4, kind).samples(0, 30)[0])


@pytest.mark.parametrize("kind", ORDERS)
def test_order_is_a_pure_function_of_the_index(kind):
    whole, _ = Order(10, 0, kind).samples(0, 40)
    for start, stop in [(0, 3), (7, 13), (38, 40), (5, 5), (9, 31)]:
        assert Order(10, 0, kind).samples(start, stop)[0].tolist() == whole[start:stop].tolist()


def test_the_order_of_earlier_builds_is_numpys():
    generator = np.random.Generator(np.random.PCG64([5, 2]))
    found, _ = Order(100, 5, "permutation").samples(200, 300)
    assert found.tolist() == generator.permutation(100).tolist()


def test_the_keyed_order_is_the_one_that_runs_began_in():
    """Another build's run resumes by it: these numbers may not change."""
    assert Keyed(1000, 0, 0)(np.arange(6)).tolist() == [587, 315, 392, 403, 648, 442]
    assert Keyed(LARGE, 2**40 + 1, 3)(np.arange(3)).tolist() == [731622793, 834302004, 835235880]


def test_a_network_over_its_whole_domain_is_defined_by_its_round_function():
    """Python's own numbers, one place at a time: nothing wraps."""

    def mixed(number: int, key: int) -> int:
        number ^= key
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return (number ^ number >> 31) >> 16

    def window(order: Keyed, place: int) -> int:
        row, column = divmod(place, order.columns)
        for one, other in order.keys.tolist():
            row = (row + mixed(column, one)) % order.rows
            column = (column + mixed(row, other)) % order.columns
        number = row * order.columns + column
        return number if number < order.size else window(order, number)

    for size in (1, 2, 7, 1000, LARGE, 2**45 + 1):
        order, places = Keyed(size, 1, 2), np.arange(size)[:50] if size < 2000 else np.arange(50)
        assert order(places).tolist() == [window(order, int(place)) for place in places]


def test_few_windows_come_in_every_order_equally_often():
    found = Counter(tuple(Keyed(5, seed, 0)(np.arange(5)).tolist()) for seed in range(3000))
    counts = np.array([*found.values()])
    assert len(found) == 120 and chi2_is_likely(counts, 3000 / 120)


@pytest.mark.parametrize("epoch", [0, 1])
def test_places_of_a_part_are_uniform_over_the_corpus(epoch):
    """The first windows of a pass, and every 65,536th: no stretch of the corpus has more."""
    for places in (np.arange(100_000), np.arange(15_000) * 65_536):
        windows = Keyed(LARGE, 3, epoch)(places)
        counts = np.bincount(windows * 100 // LARGE, minlength=100)
        # Drawn without replacement from very many: as good as independent.
        assert chi2_is_likely(counts, len(places) / 100)


def test_neighbours_in_the_order_are_no_neighbours_in_the_corpus():
    """Pairs of successive windows fill a square evenly; so does a window against its place."""
    windows = Keyed(LARGE, 0, 0)(np.arange(90_001))
    cell = windows * 30 // LARGE
    for one, other in ((cell[:-1], cell[1:]), (cell[:-31], cell[31:])):
        assert chi2_is_likely(np.bincount(one * 30 + other, minlength=900), len(one) / 900)
    correlation = np.corrcoef(windows[:-1], windows[1:])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(windows))


@pytest.mark.parametrize("one", [(0, 1), (1, 0), (2**32, 0), (0, 2**32)])
def test_epochs_and_seeds_have_orders_of_their_own(one):
    places = np.arange(90_000)
    first, other = Keyed(LARGE, 0, 0)(places), Keyed(LARGE, *one)(places)
    cells = (first * 30 // LARGE) * 30 + other * 30 // LARGE
    assert chi2_is_likely(np.bincount(cells, minlength=900), len(places) / 900)
    assert (first == other).sum() <= 2


def test_each_half_of_a_batch_mixes_all_of_the_corpus():
    """Of 512 windows, those from the corpus's first half: hypergeometric, in both halves alike."""
    size, batch = 100_000, 512
    steps = size // batch
    windows = Keyed(size, 11, 0)(np.arange(steps * batch)).reshape(steps, 2, batch // 2)
    from_first = (windows < size // 2).sum(2)  # (steps, 2)
    half = batch // 2
    deviation = math.sqrt(half / 4 * (size - half) / (size - 1))
    z = (from_first - half / 2) / deviation
    assert abs(z.mean()) < 4 / math.sqrt(z.size) and abs(z.std() - 1) < 0.15
    assert abs(np.corrcoef(from_first.T)[0, 1]) < 4 / math.sqrt(steps)


def test_nothing_of_the_corpuss_size_is_made():
    found, _ = Order(10**15, 0).samples(10**15 - 2, 10**15 + 2)
    assert len(set(found.tolist())) == 4 and found.max() < 10**15


# ---- mixtures -----------------------------------------------------------------------------------

SHARES = (0.15, 0.15, 0.4, 0.2, 0.1)  # Phi-4's table 5
WINDOWS = (1300, 290, 290, 820, 580)


@pytest.mark.parametrize("kind", ORDERS)
def test_each_part_of_a_mixture_is_read_in_its_own_order(kind):
    windows, epochs = Mixed(WINDOWS, SHARES, 5, kind).samples(0, 4000)
    for size, first in zip(WINDOWS, np.cumsum([0, *WINDOWS]), strict=False):
        mine = (windows >= first) & (windows < first + size)
        own = Order(size, 5, kind).samples(0, mine.sum())
        assert (windows[mine] - first).tolist() == own[0].tolist()
        assert epochs[mine].tolist() == own[1].tolist()


def test_shares_are_exact_at_the_end_of_every_block():
    order, first = Mixed(WINDOWS, SHARES, 2), np.cumsum([0, *WINDOWS])
    windows, _ = order.samples(0, 100 * Mixed.BLOCK)
    parts = np.searchsorted(first, windows, side="right") - 1
    for blocks in (1, 2, 7, 50, 100):
        count = blocks * Mixed.BLOCK
        read = np.bincount(parts[:count], minlength=5)
        assert np.abs(read - count * np.array(SHARES)).max() < 1
        assert order.counts(count).tolist() == read.tolist()
    assert order.counts(1000).tolist() == np.bincount(parts[:1000], minlength=5).tolist()


def test_small_shares_come_in_their_order():
    """Between two bounds that lie nearer than a sample, rounding gives and takes back."""
    shares = (0.3, 0.002, 0.001, 0.297, 0.4)
    order, first = Mixed((70, 3, 5, 20, 90), shares, 4), np.cumsum([0, 70, 3, 5, 20, 90])
    assert order.block == 1024
    windows, epochs = order.samples(0, 40 * order.block)
    parts = np.searchsorted(first, windows, side="right") - 1
    for part, size in enumerate((70, 3, 5, 20, 90)):
        mine = parts == part
        own = Order(size, 4).samples(0, mine.sum())
        assert (windows[mine] - first[part]).tolist() == own[0].tolist()
        assert epochs[mine].tolist() == own[1].tolist()
        assert abs(mine.sum() - len(windows) * shares[part]) < 1
    assert Mixed((1, 1, 1), (0.4, 1 / 128, 0.6 - 1 / 128), 0).block == 128


def test_a_mixture_is_a_pure_function_of_the_index():
    whole = Mixed(WINDOWS, SHARES, 0).samples(0, 700)
    for start, stop in [(0, 3), (120, 140), (699, 700), (5, 5), (1, 600)]:
        found = Mixed(WINDOWS, SHARES, 0).samples(start, stop)
        for mine, all_of_them in zip(found, whole, strict=True):
            assert mine.tolist() == all_of_them[start:stop].tolist()
    far, _ = Mixed((LARGE, 3), (0.999, 0.001), 0).samples(2**40, 2**40 + 5000)
    assert (far >= LARGE).sum() in range(3, 8)  # one in a thousand, however far


def test_parts_are_mixed_within_a_block():
    """Whether a sample is of a part says nothing of the next."""
    windows, _ = Mixed((50, 50), (0.5, 0.5), 1).samples(0, 512 * Mixed.BLOCK)
    of_first = windows < 50
    pairs = np.bincount(of_first[:-1] * 2 + of_first[1:], minlength=4) / len(windows)
    assert np.abs(pairs - 0.25).max() < 0.01


def test_rows_of_epochs_are_what_each_alone_is():
    places = np.tile(np.arange(50), (4, 1))
    found = KeyedRows(50, 3, [0, 7, 8, 2])(places)
    for row, epoch in zip(found, [0, 7, 8, 2], strict=True):
        assert row.tolist() == Keyed(50, 3, epoch)(np.arange(50)).tolist()
