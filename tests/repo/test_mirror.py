"""The twins mirror each other: the same files, public names, order, argument names and defaults.

Read from the sources, so that neither framework is needed, and so that the test can be tested on altered sources.
Whatever differs stands in DIFFERENCES with the framework's reason; a difference that is not there fails, and so does
an entry that no longer matches anything.
"""

from __future__ import annotations

import ast
import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_DIFFERENCES = 15


class Difference(NamedTuple):
    """Arguments or names that one twin alone has, at every place that `where` (shell patterns, "|" between) matches."""

    where: str
    torch: str
    jax: str
    reason: str


DIFFERENCES = [
    Difference(
        "*.__init__|*.from_config|*.from_checkpoint",
        torch="",
        jax="rngs, dtype, param_dtype",
        reason="Flax modules take their random streams and dtypes when they are made; torch has a global generator "
        "and model.to(dtype).",
    ),
    Difference(
        "layers|__init__",
        torch="",
        jax="checked",
        reason="torch raises by itself; inside jit JAX cannot.",
    ),
    Difference(
        "thinker.Block.__init__|thinker.ThinkerLM.__init__|vision_encoder.ViTTiny.__init__",
        torch="",
        jax="name",
        reason="A value inside a JAX program is found by the name it was given; torch hooks find it by its module.",
    ),
    Difference(
        "attention.make_attention_mask|attention.default_positions",
        torch="device",
        jax="",
        reason="torch places a new tensor on the device it is told; JAX leaves that to the compiler.",
    ),
    Difference(
        "init.xavier_uniform|init.kaiming_uniform|init.linear_default|init.bias_default|init.embedding_default",
        torch="weight, bias, generator",
        jax="key, shape, dtype, *",
        reason="torch fills a tensor in place from a generator; a Flax initializer is a function of key, shape, dtype.",
    ),
    Difference("init.init_linear", torch="", jax="key", reason="JAX has no global random state to draw from."),
    Difference(
        "init|__init__",
        torch="default_init",
        jax="",
        reason="torch re-draws a module in place; Flax draws with the initializers that a layer was made with.",
    ),
    Difference(
        "optim|__init__|optim.AdamW",
        torch="adamw_step_many, AdamW, __init__, add_param_group, load_state_dict, step",
        jax="adamw",
        reason="A JAX update takes the whole tree of parameters, torch's one tensor, hence a second for a list; its "
        "optimizer is an object, optax's a pair of functions.",
    ),
    Difference(
        "optim.init_adamw_state|optim.adamw_step|optim.decay_mask",
        torch="p, grad, model",
        jax="params, grads",
        reason="One tensor or the module that owns them in torch, a tree of them in JAX.",
    ),
    Difference(
        "data|data.DataLoader|__init__",
        torch="",
        jax="DataLoader, prefetch_to_device, __init__, set_epoch, batch",
        reason="torch.utils.data has the DataLoader, and .to(device) moves a batch; JAX leaves both to the user.",
    ),
    Difference(
        "training_utils.check_gradient_explosion|training_utils.clip_gradients|training_utils.get_lr_scheduler",
        torch="model, optimizer",
        jax="grads, lr",
        reason="torch keeps gradients in the model and the learning rate in the optimizer; JAX passes both as values.",
    ),
    Difference(
        "training.train_step_mse",
        torch="",
        jax="opt_state",
        reason="torch's optimizer keeps its state and changes the model; optax's state goes in and comes out.",
    ),
]

Sources = dict[str, str]
Surface = dict[str, list[str]]


def sources(package: str) -> Sources:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / package).glob("*.py"))}


def exported(tree: ast.Module, where: str) -> list[str]:
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert len(lists) == 1, f"{where} must say __all__ once"
    assert len(set(lists[0])) == len(lists[0]), f"{where} names something twice in __all__"
    return lists[0]


def normal_name(name: str) -> str:
    """In-place `name_` of torch is the functional `name` of JAX; nn.Module's forward is nnx.Module's __call__."""
    return "__call__" if name == "forward" else name if name.startswith("__") else name.rstrip("_")


def arguments(function: ast.FunctionDef) -> list[str]:
    """Each argument as `name` or `name=default`, keyword-only ones after "*"."""
    spec = function.args
    plain = spec.posonlyargs + spec.args
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    shown = [*zip(plain, defaults, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        shown = shown[1:]
    result = [show(arg.arg, default) for arg, default in shown]
    keyword_only = [show(arg.arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    rest = [f"*{spec.vararg.arg}"] if spec.vararg else ["*"] if keyword_only else []
    return result + rest + keyword_only + ([f"**{spec.kwarg.arg}"] if spec.kwarg else [])


def show(name: str, default: ast.expr | None) -> str:
    if default is None:
        return name
    return f"{name}={ast.unparse(default).removeprefix('torch.').removeprefix('jnp.')}"


def surface(package: Sources) -> Surface:
    """Every public place by its normalised dotted name, in order: what it takes, or what a module exports."""
    found: Surface = {"(files)": [*package]}
    for stem, text in package.items():
        tree = ast.parse(text)
        names = exported(tree, stem)
        found[stem] = [normal_name(name) for name in names]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                found[f"{stem}.{normal_name(node.name)}"] = arguments(node)
            elif isinstance(node, ast.ClassDef) and node.name in names:
                found |= members(node, f"{stem}.{node.name}")
    return found


def members(node: ast.ClassDef, where: str) -> Surface:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    public = [m for m in methods if not m.name.startswith("_") or m.name in ("__init__", "__call__")]
    fields = [ast.unparse(i.target) for i in node.body if isinstance(i, ast.AnnAssign)]
    found = {where: fields + [normal_name(m.name) for m in public]}
    return found | {f"{where}.{normal_name(m.name)}": arguments(m) for m in public}


def split(names: str) -> set[str]:
    return set(names.replace(",", " ").split())


def matches(where: str, entry: Difference) -> bool:
    return any(fnmatchcase(where, pattern) for pattern in entry.where.split("|"))


def without(items: list[str], names: set[str]) -> list[str]:
    kept = [item for item in items if item.partition("=")[0] not in names]
    return kept[:-1] if kept[-1:] == ["*"] else kept


def mismatches(torch: Surface, jax: Surface, table: list[Difference]) -> list[str]:
    """One line for everything that differs beyond the table, and for every entry of it that explains nothing."""
    found, used = [], set()
    for where in dict.fromkeys([*torch, *jax]):
        ours, theirs = torch.get(where), jax.get(where)
        for i, entry in enumerate(table):
            if ours is None or theirs is None or not matches(where, entry):
                continue
            before = (ours, theirs)
            ours, theirs = without(ours, split(entry.torch)), without(theirs, split(entry.jax))
            if (ours, theirs) != before:
                used.add(i)
        if ours is None or theirs is None:
            parent, _, name = where.rpartition(".")
            names = [split(entry.jax if ours is None else entry.torch) for entry in table if matches(parent, entry)]
            if not any(name in own for own in names):
                found.append(f"{where}: only in {'omni_jax' if ours is None else 'omni_torch'}")
        elif ours != theirs:
            found.append(f"{where}: omni_torch has ({', '.join(ours)}), omni_jax has ({', '.join(theirs)})")
    found += [f"DIFFERENCES[{i}] ({e.where}) explains nothing" for i, e in enumerate(table) if i not in used]
    return found


def test_the_twins_mirror_each_other() -> None:
    found = mismatches(surface(sources("omni_torch")), surface(sources("omni_jax")), DIFFERENCES)
    assert not found, "\n".join(["the twins have drifted apart:", *found])


def test_the_table_is_short_and_gives_reasons() -> None:
    assert len(DIFFERENCES) <= MOST_DIFFERENCES
    assert all(len(entry.reason) > 20 and (entry.torch or entry.jax) for entry in DIFFERENCES)


ALIKE = [
    "architecture",
    "audio_file",
    "chat_command",
    "checkpoint_folder",
    "config",
    "conversion",
    "files",
    "foreign_names",
    "generate_command",
    "image_file",
    "inspection",
    "interrupt",
    "mel",
    "omni_config",
    "progress",
    "prompting",
    "run_folder",
    "state_fit",
    "tokenizer",
    "train_config",
    "training_format",
    "training_text",
    "world",
    "world_batch",
]


@pytest.mark.parametrize("name", ALIKE)
def test_what_needs_no_framework_is_the_same_text(name) -> None:
    """Line by line, but for the package's name in the docstring."""
    torch, jax = (sources(package)[name].splitlines() for package in ("omni_torch", "omni_jax"))
    drift = [
        line
        for line in difflib.unified_diff(torch, jax, lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    shown = [line[1:].replace("omni_torch", "omni_jax") for line in drift]
    assert sorted(shown[::2]) == sorted(shown[1::2]), "\n".join(drift)
    assert len(drift) <= 2, "\n".join(drift)


# The test of the test: each alteration of omni_jax's sources must be noticed, and named by its place.
ALTERATIONS = {
    "argument renamed": ("losses", "ignore_index", "pad_id", "losses.cross_entropy:"),
    "argument added": ("thinker", 'tokens: Int[Array, "B T"] | None = None,', "tokens, cache=None,", "__call__:"),
    "default changed": ("layers", "eps: float = 1e-5", "eps: float = 1e-6", "layers.RMSNorm.__init__:"),
    "arguments swapped": (
        "attention",
        "        d_model: int,\n        n_heads: int,",
        "        n_heads: int,\n        d_model: int,",
        "attention.CausalSelfAttention.__init__:",
    ),
    "export forgotten": ("layers", '    "SwiGLU",\n', "", "layers:"),
    "exports out of order": (
        "attention",
        '"make_attention_mask", "default_positions"',
        '"default_positions", "make_attention_mask"',
        "attention:",
    ),
    "method added": ("thinker", "    def _embed(", "    def embed(", "thinker.ThinkerLM:"),
    "field renamed": ("config", "    n_layers: int", "    layers: int", "config.ThinkerConfig:"),
    "function gone": (
        "losses",
        '__all__ = ["cross_entropy", "next_token_loss"]',
        '__all__ = ["cross_entropy"]',
        "losses:",
    ),
    "package export forgotten": ("__init__", '    "ThinkerLM",\n', "", "__init__:"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_drift_is_noticed(name) -> None:
    stem, old, new, place = ALTERATIONS[name]
    package = sources("omni_jax")
    assert old in package[stem]
    package[stem] = package[stem].replace(old, new)
    found = mismatches(surface(sources("omni_torch")), surface(package), DIFFERENCES)
    assert any(place in line for line in found), found


def test_a_file_on_one_side_only_is_noticed() -> None:
    package = sources("omni_jax") | {"extra": "__all__ = []"}
    found = mismatches(surface(sources("omni_torch")), surface(package), DIFFERENCES)
    assert any(line.startswith("(files):") for line in found)


def test_an_entry_that_explains_nothing_is_noticed() -> None:
    stale = [*DIFFERENCES, Difference("losses.*", torch="reduction", jax="", reason="There was one once.")]
    (line,) = mismatches(surface(sources("omni_torch")), surface(sources("omni_jax")), stale)
    assert "explains nothing" in line
