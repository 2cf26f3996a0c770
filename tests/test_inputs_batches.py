"""Batches: how rows are laid side by side, and which rows go together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leveret.inputs import ORDERS, Encoded, Item, collate, padding_share, plan
from leveret.pool.order import order
from leveret.records import IGNORE
from leveret.runs import RecipeError

PAD = 99


def item(name: str, length: int, images: int = 0, *, features: bool = False, towers: tuple[str, ...] = ("t",)) -> Item:
    """`length` text tokens after `images` images of two tokens; the last is supervised. Pixels say whose they are."""
    ids = [7] * (2 * images) + list(range(1, length + 1))
    encoded = Encoded(ids, [IGNORE] * (len(ids) - 1) + ids[-1:], [True] * (2 * images) + [False] * length, "")
    if features:
        return Item(encoded, name, features=torch.full((images, 2, 4), float(length)))
    return Item(
        encoded, name, [{t: np.full((3, 2, 2), length + i / 10, np.float32) for t in towers} for i in range(images)]
    )


def test_right_padding_row_by_row() -> None:
    batch = collate([item("a", 2, 1), item("b", 1)], PAD)
    assert batch.input_ids.tolist() == [[7, 7, 1, 2], [1, PAD, PAD, PAD]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, IGNORE, 2], [1, IGNORE, IGNORE, IGNORE]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0] * 4, [0, -1, -1, -1]]
    assert batch.image_mask.tolist() == [[True, True, False, False], [False] * 4]
    assert batch.ids == ("a", "b")


def test_left_padding_ends_every_row_at_the_right_edge() -> None:
    batch = collate([item("a", 2, 1), item("b", 1)], PAD, side="left")
    assert batch.input_ids.tolist() == [[7, 7, 1, 2], [PAD, PAD, PAD, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [False, False, False, True]]
    assert batch.segments.tolist() == [[0] * 4, [-1, -1, -1, 0]]


def test_types_are_those_that_records_promise() -> None:
    batch = collate([item("a", 2, 1)], PAD)
    for name in ("input_ids", "labels", "position_ids", "segments", "tile_image"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.attention_mask.dtype == batch.image_mask.dtype == torch.bool
    assert batch.pixels["t"].dtype == torch.float32


def test_images_are_stacked_in_reading_order() -> None:
    batch = collate([item("a", 1, 2), item("b", 5), item("c", 3, 1)], PAD)
    assert batch.pixels["t"].shape == (3, 3, 2, 2) and batch.features is None
    assert batch.pixels["t"][:, 0, 0, 0].tolist() == pytest.approx([1.0, 1.1, 3.0])
    assert batch.tile_image.tolist() == [0, 1, 2]


def test_several_towers_and_features() -> None:
    two = collate([item("a", 1, 2, towers=("x", "y"))], PAD)
    assert list(two.pixels) == ["x", "y"] and two.tile_image.tolist() == [0, 1]
    cached = collate([item("a", 1, 2, features=True), item("b", 4), item("c", 3, 1, features=True)], PAD)
    assert cached.features is not None and cached.features[:, 0, 0].tolist() == [1, 1, 3]
    assert cached.pixels == {} and cached.tile_image.tolist() == [0, 1, 2]


def test_text_only_rows_bring_no_images() -> None:
    batch = collate([item("a", 3), item("b", 1)], PAD)
    assert batch.pixels == {} and batch.features is None and not batch.image_mask.any() and len(batch.tile_image) == 0


def test_what_cannot_be_collated_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], PAD)
    with pytest.raises(ValueError, match="allowed: right, left"):
        collate([item("a", 1)], PAD, side="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        collate([item("a", 1, 1), item("b", 1, 1, features=True)], PAD)
    with pytest.raises(ValueError, match="different towers"):
        collate([item("a", 1, 1), item("b", 1, 1, towers=("x",))], PAD)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=6),
    st.sampled_from(["right", "left"]),
)
def test_nothing_is_lost_or_added(rows: list[tuple[int, int]], side: str) -> None:
    items = [item(str(n), length, images) for n, (length, images) in enumerate(rows)]
    batch = collate(items, PAD, side=side)  # type: ignore[arg-type]
    for row, one in enumerate(items):
        real = batch.attention_mask[row]
        assert batch.input_ids[row][real].tolist() == one.encoded.input_ids
        assert batch.labels[row][real].tolist() == one.encoded.labels
        assert batch.image_mask[row][real].tolist() == one.encoded.image_mask
        assert batch.position_ids[row][real].tolist() == list(range(len(one.encoded.input_ids)))
        assert (batch.labels[row][~real] == IGNORE).all() and not batch.image_mask[row][~real].any()
    assert sum(images for _, images in rows) == len(batch.tile_image)


# --- plan -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 5))
def test_every_index_once_in_full_batches(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    batches = plan(lengths, batch, seed, epoch)
    assert Counter(index for rows in batches for index in rows) == Counter(range(len(lengths)))
    sizes = sorted((len(rows) for rows in batches), reverse=True)
    assert all(size == batch for size in sizes[:-1]) and len(batches) == -(-len(lengths) // batch)
    assert batches == plan(np.asarray(lengths), batch, seed, epoch)


@given(
    st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 2**31),
    st.integers(0, 5), st.sampled_from(sorted(ORDERS)),
)  # fmt: skip
def test_every_order_is_a_pure_function_that_leaves_no_row_out(
    lengths: list[int], batch: int, seed: int, epoch: int, by: str
) -> None:
    try:
        batches = plan(lengths, batch, seed, epoch, by=by)
    except RecipeError as error:
        assert by in ("tinyllava", "prismatic") and len({length > 0 for length in lengths}) == 1, error
        return
    assert batches == plan(np.asarray(lengths), batch, seed, epoch, by=by)
    assert len(batches) == len(plan(lengths, batch, seed + 1, epoch + 1, by=by)), "every epoch has as many steps"
    counts = Counter(index for rows in batches for index in rows)
    assert set(counts) == set(range(len(lengths)))
    if by == "prismatic":
        kinds = Counter(length > 0 for length in lengths)
        # A kind smaller than its batch cannot be filled up from itself without coming twice.
        assert all(len(rows) <= batch for rows in batches) and max(counts.values()) <= 2
        assert len(batches) == sum(-(-many // batch) for many in kinds.values())
    else:
        assert set(counts.values()) == {1} and all(0 < len(rows) <= batch for rows in batches)
    if by in ("modality", "prismatic"):
        assert all(len({lengths[row] > 0 for row in rows}) == 1 for rows in batches)


def test_an_unknown_order_is_named_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="order: 'longest' given; allowed are length, modality"):
        plan([1], 1, 0, 0, by="longest")


def test_epochs_and_seeds_differ() -> None:
    lengths = [10] * 40
    orders = [plan(lengths, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for n, one in enumerate(orders) for other in orders[:n])


def test_batch_must_hold_something() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        plan([1], 0, 0, 0)


def test_buckets_save_most_of_the_padding_of_random_batches() -> None:
    """On lengths with a long tail (log-normal, as conversations have), measured in padding and not in time."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 20_000), 10, 2048).astype(int)
    for batch in (8, 32):
        shuffled = order(len(lengths), 0, 0)
        random = [shuffled[at : at + batch].tolist() for at in range(0, len(lengths), batch)]
        bucketed = padding_share(lengths, plan(lengths, batch, 0, 0))
        assert padding_share(lengths, random) > 0.5 and bucketed < padding_share(lengths, random) / 6


def test_lengths_do_not_come_in_order() -> None:
    """Short and long batches are mixed over the epoch: a training loop must not see all short rows first."""
    lengths = np.arange(1, 4097)
    means = np.array([lengths[rows].mean() for rows in plan(lengths, 8, 0, 0)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    halves = means[: len(means) // 2].mean() / means[len(means) // 2 :].mean()
    assert 0.85 < halves < 1.15


def test_padding_share() -> None:
    assert padding_share([1, 3], [[0, 1]]) == pytest.approx(2 / 6)
    assert padding_share([5], [[0]]) == padding_share([], []) == 0
