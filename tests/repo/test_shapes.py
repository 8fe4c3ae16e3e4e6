"""The shapes that public signatures promise are true: both twins run under jaxtyping's hook with beartype."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import warnings
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)  # from flax's own aliases
from jaxtyping import install_import_hook
with install_import_hook(["omni_jax", "omni_torch"], "beartype.beartype"):
    import omni_jax, omni_torch
    import omni_jax.losses, omni_torch.losses
import jax, numpy as np, torch
from jaxtyping import TypeCheckError

sizes = dict(vocab_size=61, n_layers=1, d_model=24, n_heads=4, d_ff=20, ctx_len=32)
kinds = [{}, {"use_gqa": True, "use_swiglu": False}, {"use_gqa": True, "use_moe": True, "num_experts": 3}]
tokens = np.array([[1, 5, 9, 4, 0], [1, 7, 3, 0, 0]], np.int32)
mask = tokens != 0
for kind in kinds:
    net = omni_torch.ThinkerLM.from_config(omni_torch.ThinkerConfig(**sizes, **kind)).eval()
    logits = net(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask))
    loss = omni_torch.losses.cross_entropy(logits, torch.from_numpy(tokens).long())
    assert logits.shape == (2, 5, 61) and loss.shape == ()
    if kind is not kinds[-1]:
        continue  # the annotations are the same file by file; one kind in JAX keeps its compile time small
    model = omni_jax.ThinkerLM.from_config(omni_jax.ThinkerConfig(**sizes, **kind))
    model.eval()
    logits = model(jax.numpy.asarray(tokens), attention_mask=jax.numpy.asarray(mask))
    loss = omni_jax.losses.cross_entropy(logits, jax.numpy.asarray(tokens))
    assert logits.shape == (2, 5, 61) and loss.shape == ()

encoder = dict(d=12, heads=2, ff=16, layers=1)
sections = {"thinker": sizes, "audio": encoder, "vision": encoder | dict(img_size=16, patch=8)}
batch = {
    "images": np.ones((2, 3, 16, 16), np.float32),
    "mel": np.ones((2, 9, 128), np.float32),
    "mel_lengths": np.array([9, 5], np.int32),
    "has_image": np.array([True, False]),
    "has_audio": np.array([True, True]),
    "attention_mask": mask,
}
wave = np.ones(2000, np.float32)
net = omni_torch.OmniLM.from_config(omni_torch.OmniConfig.from_dict(sections)).eval()
given = {name: torch.from_numpy(value) for name, value in batch.items()}
ids = torch.from_numpy(tokens).long()
assert net(ids, **given).shape == (2, 9, 61) and net.loss(ids, ids, **given).shape == ()
assert net.features(torch.from_numpy(wave)).shape == (13, 128)
model = omni_jax.OmniLM.from_config(omni_jax.OmniConfig.from_dict(sections))
model.eval()
logits, loss = jax.eval_shape(lambda ids, batch: (model(ids, **batch), model.loss(ids, ids, **batch)), tokens, batch)
assert logits.shape == (2, 9, 61) and loss.shape == ()
assert jax.eval_shape(model.features, wave).shape == (13, 128)
for omni, own, array in ((omni_torch, net, torch.from_numpy), (omni_jax, model, np.asarray)):
    seen = [array(np.ones((3, 16, 16), np.float32))]
    assert len(omni.generate(own, [[1, 5, 9]], 2, eos_id=None, images=seen).tokens[0]) == 2

def media(omni, array):
    # Every public function of sound and pictures, once.
    bank = omni.mel_filter_bank(16000, 64, 8)
    assert bank.shape == (33, 8) and omni.hz_to_mel(omni.mel_to_hz(np.ones(3))).shape == (3,)
    assert omni.log_mel(omni.mel_spectrogram(array(np.stack([wave, wave])), n_fft=64, n_mels=8)).shape == (2, 8, 13)
    assert omni.load_audio("examples/sample_audio.wav").shape == (35200,)
    picture = omni.load_image("examples/sample_image.png", (16, 24))
    assert picture.shape == (3, 16, 24)
    assert omni.resize(array(np.zeros((3, 5, 7), np.uint8)), (2, 3)).shape == (3, 2, 3)
    patches = omni.patchify(picture[None], 8)
    assert patches.shape == (1, 6, 192) and omni.unpatchify(patches, 8, 16, 24).shape == (1, 3, 16, 24)
    assert omni.resize_positions(array(np.zeros((1, 7, 4), np.float32)), (2, 3), (4, 5)).shape == (1, 21, 4)
    logits, targets = np.zeros((2, 6, 5), np.float32), np.array([[1, 2], [3, 0]], np.int32)
    lengths = np.array([6, 4], np.int32), np.array([2, 1], np.int32)
    assert omni.ctc_loss(*map(array, (logits, targets, *lengths))).shape == (2,)

media(omni_torch, torch.from_numpy)
media(omni_jax, jax.numpy.asarray)
net = omni_torch.ViTTiny(img_size=16, patch=8, **encoder).eval()
cls, grid = net(torch.zeros(2, 3, 16, 24))
assert cls.shape == (2, 1, 12) and grid.shape == (2, 6, 12)
out, lengths = omni_torch.AudioEncoderTiny(**encoder).eval()(given["mel"], given["mel_lengths"])
assert omni_torch.CTCHead(12, 5)(out).shape == (2, 3, 5) and lengths.tolist() == [3, 2]

try:
    omni_torch.losses.cross_entropy(torch.zeros(2, 3, 61), torch.zeros(2, 3))  # float targets
except TypeCheckError:
    print("ok")
"""


def test_both_twins_keep_the_shapes_they_promise():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"
