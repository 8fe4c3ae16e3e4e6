"""parity.weights: names and layouts bind by rules, fail closed, and values cross without a changed bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity.errors import Misuse
from parity.weights import Link, bind, leaf_names, to_jax, to_torch


def links_of(**shapes) -> list[Link]:
    """bind with dotted names written with two underscores: jax=..., torch=..."""
    return bind(shapes["jax"], shapes["torch"], **{k: v for k, v in shapes.items() if k not in ("jax", "torch")})


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


# ------------------------------------------------------------------------------------------------ names


def test_the_last_part_of_a_name_follows_the_rules():
    jax_shapes = {
        "blocks.0.q_proj.kernel": (4, 6),
        "blocks.0.norm.scale": (4,),
        "tok_emb.embedding": (9, 4),
        "head.bias": (3,),
        "kernel_size.gain": (2, 3),
        "scale": (1,),
    }
    torch_shapes = {
        "blocks.0.q_proj.weight": (6, 4),
        "blocks.0.norm.weight": (4,),
        "tok_emb.weight": (9, 4),
        "head.bias": (3,),
        "kernel_size.gain": (2, 3),
        "weight": (1,),
    }
    links = bind(jax_shapes, torch_shapes)
    assert [link.jax for link in links] == list(jax_shapes)
    assert [link.torch for link in links] == list(torch_shapes)
    assert [link.axes for link in links] == [(1, 0), None, None, None, None, None]


def test_a_fused_projection_is_its_attentions_own():
    jax_shapes = {"blocks.0.self_attn.in_proj.kernel": (4, 12), "in_proj.bias": (12,), "my_in_proj.kernel": (4, 6)}
    torch_shapes = {"blocks.0.self_attn.in_proj_weight": (12, 4), "in_proj_bias": (12,), "my_in_proj.weight": (6, 4)}
    links = bind(jax_shapes, torch_shapes)
    assert [link.torch for link in links] == list(torch_shapes)
    assert [link.axes for link in links] == [(1, 0), None, (1, 0)]


@pytest.mark.parametrize(
    ("there", "here"),
    [((6, 4, 3), (3, 4, 6)), ((6, 4, 3, 2), (3, 2, 4, 6)), ((6, 4, 3, 2, 5), (3, 2, 5, 4, 6)), ((6,), (6,))],
)
def test_convolutions_are_laid_out_as_each_framework_has_them(there: tuple[int, ...], here: tuple[int, ...]):
    (link,) = bind({"conv.kernel": here}, {"conv.weight": there})
    array = np.arange(np.prod(there)).reshape(there)
    ours = link.to_jax(array)
    assert ours.shape == here
    assert np.array_equal(link.to_torch(ours), array)
    if len(there) > 2:  # out and in are the last two in JAX: one entry followed through
        assert ours[(*(s - 1 for s in here[:-2]), 1, 2)] == array[(2, 1, *(s - 1 for s in there[2:]))]


def test_rename_and_axes_bind_other_layouts():
    links = bind(
        {"attn.wq": (8, 2, 4), "tied": (3,)},
        {"attn.q.weight": (2, 4, 8), "other.name": (3,)},
        rename={"attn.wq": "attn.q.weight", "tied": "other.name"},
        axes={"attn.wq": (2, 0, 1)},
    )
    array = np.random.default_rng(0).standard_normal((2, 4, 8))
    assert links[0].to_jax(array).shape == (8, 2, 4)
    assert links[0].to_jax(array)[5, 1, 3] == array[1, 3, 5]
    assert np.array_equal(links[0].to_torch(links[0].to_jax(array)), array)


def test_a_square_kernel_is_transposed_although_no_shape_asks_for_it():
    (link,) = bind({"fc.kernel": (3, 3)}, {"fc.weight": (3, 3)})
    array = np.arange(9.0).reshape(3, 3)
    assert np.array_equal(link.to_jax(array), array.T)


# ------------------------------------------------------------------------------------------------ fail-closed


def test_everything_wrong_is_listed_at_once():
    jax_shapes = {"a.kernel": (4, 6), "alone.bias": (2,), "twin.scale": (5,), "twin.weight": (5,), "deep": (2, 2)}
    torch_shapes = {"a.weight": (7, 4), "twin.weight": (5,), "nobody.weight": (9,), "deep": (4,)}
    with pytest.raises(Misuse) as caught:
        bind(jax_shapes, torch_shapes, rename={"ghost": "a.weight"}, axes={"spirit": (1, 0)})
    words = str(caught.value)
    for part in (
        "rename: 'ghost' is not a JAX parameter",
        "axes: 'spirit' is not a JAX parameter",
        "a.kernel (4, 6): torch a.weight is (7, 4), as JAX would lay it out (4, 7)",
        "alone.bias (2,): no torch parameter 'alone.bias'",
        "twin.weight: torch parameter 'twin.weight' is already the partner of twin.scale",
        "deep (2, 2): torch deep is (4,)",
        "torch nobody.weight (9,): no JAX parameter",
        "pass rename= or axes=",
    ):
        assert part in words


def test_a_rename_to_nowhere_is_told():
    with pytest.raises(Misuse, match="no torch parameter 'b'"):
        bind({"a": (1,)}, {"a": (1,)}, rename={"a": "b"})


@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 1, 2), (1, 2), (-1, 0)])
def test_axes_that_are_no_permutation_are_refused(axes: tuple[int, ...]):
    with pytest.raises(Misuse, match="axes"):
        bind({"w": (3, 3)}, {"w": (3, 3)}, axes={"w": axes})


def test_a_kernel_without_a_known_layout_is_refused():
    with pytest.raises(Misuse, match="axes="):
        bind({"conv.kernel": (1,) * 6}, {"conv.weight": (1,) * 6})


def test_values_of_another_shape_than_bound_are_refused():
    links = bind({"a.kernel": (2, 3)}, {"a.weight": (3, 2)})
    with pytest.raises(Misuse, match=r"a\.weight"):
        to_jax(links, {"a.weight": np.zeros((2, 3))}, {"a": {"kernel": np.zeros((2, 3))}})


def test_trees_of_other_names_are_refused():
    links = bind({"a": (1,)}, {"a": (1,)})
    with pytest.raises(Misuse, match=r"b: not bound[\s\S]*a: bound, but not in this tree"):
        to_torch(links, {"b": np.zeros(1)})
    with pytest.raises(Misuse, match="c: a value for no parameter"):
        to_jax(links, {"a": np.zeros(1), "c": np.zeros(1)}, {"a": np.zeros(1)})


def test_missing_values_are_named():
    links = bind({"a.bias": (2,), "b": (1,)}, {"a.bias": (2,), "b": (1,)})
    with pytest.raises(Misuse, match=r"a\.bias"):
        to_jax(links, {"b": np.zeros(1)}, {"a": {"bias": np.zeros(2)}, "b": np.zeros(1)})


# ------------------------------------------------------------------------------------------------ values


SHAPES = [(), (0,), (3,), (2, 3), (0, 4), (4, 2, 3), (2, 3, 1, 4), (2, 1, 3, 2, 2)]
TYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.bool_]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(TYPES), st.integers(0, 2**31), st.booleans())
def test_values_cross_bit_for_bit(shape: tuple[int, ...], kind, seed: int, kernel: bool):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape, np.dtype(kind).itemsize), dtype=np.uint8)  # any bits: NaNs, denormals, -0
    array = np.frombuffer(raw.tobytes(), np.uint8 if kind is np.bool_ else kind).reshape(shape)
    array = array > 127 if kind is np.bool_ else array
    name = "m.kernel" if kernel else "m.value_of"
    partner = "m.weight" if kernel else name
    axes = {3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0), 2: (1, 0)}.get(len(shape)) if kernel else None
    seen = tuple(shape[a] for a in axes) if axes else shape
    links = bind({name: seen}, {partner: shape})
    tree = {"m": {name.partition(".")[2]: np.zeros(seen)}}
    there = to_jax(links, {partner: array}, tree)
    (leaf,) = there["m"].values()
    assert leaf.shape == seen
    assert leaf.dtype == array.dtype
    back = to_torch(links, there)[partner]
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert bits(back) == bits(array)


@settings(max_examples=40, deadline=None)
@given(hnp.array_shapes(min_dims=1, max_dims=5, max_side=4), st.randoms(use_true_random=False))
def test_any_permutation_is_undone(shape: tuple[int, ...], random):
    axes = list(range(len(shape)))
    random.shuffle(axes)
    array = np.arange(np.prod(shape)).reshape(shape)
    link = Link("a", "a", tuple(axes))
    assert np.array_equal(link.to_torch(link.to_jax(array)), array)


# ------------------------------------------------------------------------------------------------ trees


def test_leaf_names_follow_the_order_of_the_leaves():
    tree = {"b": [np.zeros(1), {"kernel": np.zeros(2)}], "a": (np.zeros(3),)}
    assert leaf_names(tree) == ["a.0", "b.0", "b.1.kernel"]
    assert leaf_names(np.zeros(1)) == [""]
    assert leaf_names({}) == []


def test_nnx_states_have_plain_names():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)])
            self.emb = nnx.Embed(4, 2, rngs=rngs)
            self.value = nnx.Param(np.ones(2, np.float32))

    _, state, _ = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    expected = ["blocks.0.bias", "blocks.0.kernel", "blocks.1.bias", "blocks.1.scale", "emb.embedding", "value"]
    assert leaf_names(state) == expected
    assert leaf_names(nnx.to_pure_dict(state)) == expected


def test_a_tree_comes_back_in_its_own_structure():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(2, 3, rngs=rngs, precision="highest")

    graphdef, state = nnx.split(Model(nnx.Rngs(0)))
    links = bind({"fc.bias": (3,), "fc.kernel": (2, 3)}, {"fc.weight": (3, 2), "fc.bias": (3,)})
    weights = {"fc.weight": np.arange(6.0, dtype=np.float32).reshape(3, 2), "fc.bias": np.ones(3, np.float32)}
    model = nnx.merge(graphdef, to_jax(links, weights, state))
    x = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(model.fc(x), x @ weights["fc.weight"].T + 1)
    back = to_torch(links, nnx.split(model)[1])
    assert {k: bits(v) for k, v in back.items()} == {k: bits(v) for k, v in weights.items()}
