"""The real reports behind the catalogue: porting bugs that somebody made and published, and what became of each here.

A row without a reason has at least one mutant; a test holds that. `links` are third parties' own words.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A report: what went wrong, where it is told, and why no mutant stands for it (or "")."""

    what: str
    links: tuple[str, ...] = ()
    reason: str = ""


ROWS: dict[str, Row] = {
    "N01": Row(
        "another eps in a norm",
        ("https://github.com/huggingface/candle/issues/271", "https://github.com/OpenNMT/CTranslate2/issues/951"),
        "",
    ),
    "N02": Row("eps None means the dtype's machine epsilon", ("https://github.com/goodfire-ai/spd/issues/625",), ""),
    "N03": Row("eps outside the square root", (), ""),
    "N04": Row(
        "the first positional field of flax's LayerNorm is its epsilon",
        ("https://github.com/google/flax/issues/2195",),
        "",
    ),
    "N05": Row(
        "fast variance, E[x²] − E[x]²",
        (
            "https://github.com/keras-team/keras-core/issues/866",
            "https://github.com/pytorch/pytorch/issues/51102",
            "https://github.com/patrick-kidger/equinox/issues/314",
        ),
        "",
    ),
    "N07": Row(
        "the scale before or after the cast; 1 + scale",
        (
            "https://github.com/google/gemma_pytorch/issues/67",
            "https://github.com/vllm-project/vllm/issues/42325",
            "https://github.com/vllm-project/vllm/issues/29810",
        ),
        "",
    ),
    "N08": Row(
        "an in-place operation on what was not copied", ("https://github.com/GeeeekExplorer/nano-vllm/issues/170",), ""
    ),
    "N09": Row("divided by D − 1", (), ""),
    "N10": Row("norm scales that were never loaded", ("https://github.com/huggingface/transformers/issues/19683",), ""),
    "N11": Row(
        "BatchNorm's momentum and running variance",
        (
            "https://github.com/pytorch/examples/issues/289",
            "https://github.com/scverse/scvi-tools/issues/2309",
            "https://github.com/pytorch/pytorch/issues/19902",
        ),
        "neither twin has a BatchNorm",
    ),
    "N12": Row(
        "QK-norm over all heads, not each",
        ("https://github.com/AI-Hypercomputer/maxtext/issues/3112",),
        "neither twin norms queries or keys",
    ),
    "A01": Row(
        "key/value heads tiled, not repeated",
        (
            "https://github.com/apple/axlearn/issues/842",
            "https://github.com/ekzhang/jax-js/issues/180",
            "https://github.com/onnx/onnx/issues/7274",
        ),
        "",
    ),
    "A02": Row(
        "another scale of the scores",
        (
            "https://github.com/huggingface/transformers/issues/31891",
            "https://github.com/mlc-ai/mlc-llm/issues/3426",
            "https://github.com/ggml-org/llama.cpp/issues/13951",
        ),
        "",
    ),
    "A03": Row(
        "soft caps of scores, missing or extra",
        ("https://github.com/InternLM/lmdeploy/issues/2842", "https://github.com/ggml-org/llama.cpp/issues/8197"),
        "",
    ),
    "A04": Row("the causal diagonal off by one", (), ""),
    "A05": Row(
        "is_causal is aligned at the top left",
        ("https://github.com/pytorch/pytorch/issues/108108", "https://github.com/pytorch/pytorch/issues/144858"),
        "",
    ),
    "A06": Row(
        "a mask's polarity",
        (
            "https://github.com/rasbt/LLMs-from-scratch/issues/1061",
            "https://github.com/lucidrains/x-transformers/issues/160",
        ),
        "",
    ),
    "A08": Row(
        "a finite fill, or one that overflows in float16",
        ("https://github.com/google/flax/issues/982", "https://github.com/huggingface/transformers/issues/21197"),
        "",
    ),
    "A09": Row(
        "rows without any key",
        (
            "https://github.com/huggingface/transformers/issues/21150",
            "https://github.com/huggingface/transformers/issues/19897",
            "https://github.com/pytorch/pytorch/issues/103963",
        ),
        "",
    ),
    "A10": Row(
        "a sliding window off by one",
        (
            "https://github.com/huggingface/transformers/issues/29176",
            "https://github.com/huggingface/transformers/issues/39408",
            "https://github.com/vllm-project/vllm/issues/3385",
        ),
        "",
    ),
    "A11": Row("softmax in bfloat16", (), ""),
    "A13": Row(
        "a square weight that is not transposed",
        (
            "https://github.com/sgl-project/sglang-jax/issues/1279",
            "https://github.com/huggingface/transformers/issues/9054",
        ),
        "",
    ),
    "A14": Row("a fused projection cut wrongly", ("https://github.com/huggingface/transformers/issues/40253",), ""),
    "A15": Row(
        "packed documents that see each other",
        (),
        "rows run on into the next document by design, as the family's do; a mask of documents is the caller's",
    ),
    "P01": Row(
        "pairs interleaved, not halves",
        (
            "https://github.com/huggingface/transformers/issues/25199",
            "https://github.com/rasbt/LLMs-from-scratch/issues/747",
            "https://github.com/tenstorrent/tt-metal/issues/26844",
            "https://github.com/vllm-project/vllm-metal/issues/44",
            "https://github.com/karpathy/nanochat/issues/264",
        ),
        "",
    ),
    "P02": Row(
        "q and k permuted for RoPE with the wrong halves",
        (
            "https://github.com/foundation-model-stack/foundation-model-stack/issues/527",
            "https://github.com/young-geng/EasyLM/issues/7",
        ),
        "",
    ),
    "P03": Row(
        "theta, scaling or a table's end ignored",
        (
            "https://github.com/TransformerLensOrg/TransformerLens/issues/910",
            "https://github.com/swiss-ai/Megatron-LM/issues/85",
            "https://github.com/AI-Hypercomputer/maxtext/issues/3832",
        ),
        "",
    ),
    "P04": Row(
        "positions off by one in decoding",
        (
            "https://github.com/thu-nics/C2C/issues/19",
            "https://github.com/huggingface/transformers/issues/35044",
            "https://github.com/huggingface/transformers/issues/48161",
        ),
        "",
    ),
    "P06": Row("angles in a narrower type", ("https://github.com/Lightning-AI/litgpt/issues/1031",), ""),
    "P07": Row(
        "T5's relative buckets",
        (
            "https://github.com/huggingface/candle/issues/1312",
            "https://github.com/huggingface/candle/issues/727",
            "https://github.com/lucidrains/x-transformers/issues/10",
            "https://github.com/huggingface/transformers/issues/8518",
        ),
        "neither twin has relative position buckets",
    ),
    "P08": Row(
        "an offset of positions or rows of a table",
        (
            "https://github.com/huggingface/transformers/issues/19240",
            "https://github.com/huggingface/sentence-transformers/issues/3879",
        ),
        "",
    ),
    "P09": Row(
        "positions that count padding",
        (
            "https://github.com/huggingface/transformers/issues/30053",
            "https://github.com/huggingface/transformers/issues/20479",
        ),
        "",
    ),
    "P10": Row("a narrow integer that overflows", ("https://github.com/jax-ml/jax/issues/16557",), ""),
    "M01": Row(
        "the tanh form of GELU",
        (
            "https://github.com/jax-ml/jax/issues/4428",
            "https://github.com/goodfire-ai/spd/issues/624",
            "https://github.com/tinygrad/tinygrad/issues/16162",
            "https://github.com/chelsea0x3b/dfdx/issues/804",
        ),
        "",
    ),
    "M02": Row("quick GELU and other activations", (), ""),
    "M03": Row(
        "gate and up change places",
        (
            "https://github.com/nntrainer/nntrainer/issues/4194",
            "https://github.com/ml-explore/mlx-lm/issues/767",
            "https://github.com/openvinotoolkit/openvino/issues/32683",
        ),
        "",
    ),
    "M05": Row(
        "softmax after top-k, weights not renormalised, a router without gradient",
        ("https://github.com/NVIDIA/Megatron-LM/issues/894", "https://github.com/NVIDIA/Megatron-LM/issues/955"),
        "",
    ),
    "M06": Row(
        "an auxiliary loss with softmax twice",
        ("https://github.com/huggingface/transformers/issues/45120",),
        "neither twin has an auxiliary loss",
    ),
    "M07": Row(
        "an auxiliary loss that counts otherwise",
        ("https://github.com/huggingface/transformers/issues/43775", "https://github.com/paiml/aprender/issues/2162"),
        "neither twin has an auxiliary loss",
    ),
    "M08": Row("the order of ties in top-k", (), ""),
    "E01": Row(
        "embeddings scaled by √D, or rounded",
        (
            "https://github.com/huggingface/transformers/issues/29402",
            "https://github.com/google/gemma_pytorch/issues/67",
        ),
        "",
    ),
    "E02": Row(
        "a tied head lost, or tied where it must not be",
        (
            "https://github.com/huggingface/transformers/issues/43429",
            "https://github.com/NVIDIA/TensorRT-LLM/issues/3324",
        ),
        "",
    ),
    "E03": Row(
        "a tied weight with two gradients",
        (
            "https://github.com/paiml/entrenar/issues/314",
            "https://github.com/NVIDIA/Megatron-LM/issues/656",
            "https://github.com/NVIDIA-NeMo/Automodel/issues/2511",
        ),
        "",
    ),
    "E04": Row(
        "padded slots of the vocabulary",
        (
            "https://github.com/unslothai/unsloth/issues/10616",
            "https://github.com/mirage-project/mirage/issues/751",
            "https://github.com/Blaizzy/mlx-vlm/issues/1917",
        ),
        "neither twin pads its vocabulary: every row is a token",
    ),
    "E06": Row(
        "a token id out of range",
        (
            "https://github.com/jax-ml/jax/issues/3774",
            "https://github.com/jax-ml/jax/issues/14193",
            "https://github.com/jax-ml/jax/issues/9839",
            "https://github.com/jax-ml/jax/issues/7595",
        ),
        "",
    ),
    "I01": Row(
        "flax's and torch's default laws of a Linear",
        (
            "https://github.com/jax-ml/jax/issues/4862",
            "https://github.com/google/flax/issues/3125",
            "https://github.com/google/flax/issues/215",
        ),
        "",
    ),
    "I02": Row("the standard deviation of embeddings", ("https://github.com/google/flax/issues/3125",), ""),
    "I03": Row(
        "truncated normals and small factors",
        (
            "https://github.com/google/flax/issues/4091",
            "https://github.com/huggingface/pytorch-image-models/issues/1286",
            "https://github.com/openvax/mhcflurry/issues/376",
        ),
        "",
    ),
    "I04": Row("fans of kernels counted on the wrong axes", ("https://github.com/keras-team/keras/issues/22789",), ""),
    "I06": Row(
        "one key for several tensors",
        (
            "https://github.com/google/flax/issues/4950",
            "https://github.com/google/flax/issues/2665",
            "https://github.com/netket/netket/issues/241",
        ),
        "",
    ),
    "I08": Row("weight_norm's g", ("https://github.com/google/flax/issues/4138",), "neither twin has weight_norm"),
    "O01": Row(
        "Adam's eps inside the root",
        ("https://github.com/FluxML/Flux.jl/issues/448", "https://github.com/pytorch/pytorch/issues/2060"),
        "",
    ),
    "O03": Row("bias correction by another step", ("https://github.com/jax-ml/jax/issues/4834",), ""),
    "O04": Row(
        "decay that enters the moments, or misses the rate",
        ("https://github.com/google-deepmind/optax/issues/417",),
        "",
    ),
    "O05": Row(
        "another default decay",
        (
            "https://github.com/jolibrain/deepdetect/issues/1462",
            "https://github.com/huggingface/transformers/issues/7214",
        ),
        "",
    ),
    "O07": Row(
        "a decay mask that is inverted or misses names",
        (
            "https://github.com/huggingface/transformers/issues/18273",
            "https://github.com/huggingface/transformers/issues/11936",
            "https://github.com/huggingface/transformers/issues/4360",
            "https://github.com/salesforce/jaxformer/issues/28",
        ),
        "",
    ),
    "O08": Row("other betas", (), ""),
    "O09": Row(
        "accumulated gradients summed, not averaged",
        ("https://github.com/paiml/aprender/issues/2123", "https://github.com/huggingface/transformers/issues/35438"),
        "",
    ),
    "O10": Row(
        "means of means with unequal counts",
        (
            "https://github.com/huggingface/transformers/issues/34191",
            "https://github.com/huggingface/transformers/issues/35203",
            "https://github.com/huggingface/blog/issues/2414",
        ),
        "",
    ),
    "O11": Row(
        "what a mask excludes is changed all the same",
        (
            "https://github.com/google-deepmind/optax/issues/159",
            "https://github.com/google-deepmind/optax/issues/477",
            "https://github.com/KellerJordan/Muon/issues/54",
        ),
        "",
    ),
    "O12": Row(
        "updates lost in a narrow parameter",
        (
            "https://github.com/workofart/ml-by-hand/issues/85",
            "https://github.com/areal-project/AReaL/issues/1369",
            "https://github.com/NVIDIA/apex/issues/1728",
        ),
        "",
    ),
    "O13": Row("RMSprop's eps and decay", (), "neither twin has RMSprop"),
    "O14": Row(
        "optimizers of one name that apply decay elsewhere",
        ("https://github.com/mlcommons/algorithmic-efficiency/issues/809",),
        "",
    ),
    "S01": Row("the schedule's count off by one", ("https://github.com/pytorch/torchtitan/issues/1010",), ""),
    "S03": Row(
        "warm-up inside or outside the descent; floors",
        (
            "https://github.com/marin-community/levanter/issues/124",
            "https://github.com/google-deepmind/optax/issues/835",
        ),
        "",
    ),
    "S04": Row(
        "micro-batches counted as steps, or lost",
        (
            "https://github.com/AI-Hypercomputer/maxtext/issues/3452",
            "https://github.com/facebookresearch/vilbert-multi-task/issues/20",
        ),
        "",
    ),
    "C01": Row(
        "the eps beside the norm in clipping",
        ("https://github.com/goodfire-ai/spd/issues/643", "https://github.com/goodfire-ai/spd/issues/645"),
        "",
    ),
    "C02": Row(
        "clipping by parts instead of the global norm", ("https://github.com/huggingface/transformers/issues/614",), ""
    ),
    "X01": Row(
        "labels shifted twice, or not at all",
        (
            "https://github.com/huggingface/transformers/issues/47394",
            "https://github.com/huggingface/transformers/issues/46897",
            "https://github.com/huggingface/transformers/issues/37830",
            "https://github.com/huggingface/transformers/issues/44642",
        ),
        "",
    ),
    "X03": Row(
        "a mean of means over unequal parts",
        (
            "https://github.com/huggingface/transformers/issues/19494",
            "https://github.com/mlcommons/algorithmic-efficiency/issues/314",
        ),
        "",
    ),
    "X04": Row("the label that is ignored", (), ""),
    "X05": Row("a batch whose every label is ignored", (), ""),
    "X06": Row(
        "PAD and EOS taken for each other",
        ("https://github.com/huggingface/transformers/issues/23530", "https://github.com/huggingface/trl/issues/976"),
        "",
    ),
    "X07": Row("cross-entropy on bfloat16 logits", (), ""),
    "X08": Row("label smoothing", ("https://github.com/OpenNMT/OpenNMT/issues/570",), ""),
    "X09": Row("gradients scaled by the number of parts", ("https://github.com/jax-ml/jax/issues/3970",), ""),
    "G01": Row(
        "d|x|/dx at 0",
        ("https://github.com/jax-ml/jax/issues/37820",),
        "neither twin takes an absolute value on a path that has a gradient",
    ),
    "G02": Row("half a gradient where a kink is", ("https://github.com/jax-ml/jax/issues/37821",), ""),
    "G03": Row(
        "the gradient of a clip at its bound",
        (),
        "no clip on a path that has a gradient; floors use a comparison, whose gradient at the bound is 0 in both",
    ),
    "G04": Row(
        "the gradient of a maximum with ties",
        (),
        "every maximum is kept out of the gradient (and attention-top-gradient shows that it cancels anyway)",
    ),
    "G05": Row(
        "the gradient of a norm at 0",
        ("https://github.com/jax-ml/jax/issues/3058", "https://github.com/jax-ml/jax/issues/4177"),
        "no norm of a vector lies on a path that has a gradient: clipping's is taken of gradients",
    ),
    "G07": Row(
        "rematerialised values rounded otherwise",
        ("https://github.com/jax-ml/jax/issues/22244",),
        "neither twin rematerialises",
    ),
    "G08": Row("stop_gradient missing or misplaced", (), ""),
    "D01": Row(
        "TF32 inside float32 products",
        (
            "https://github.com/jax-ml/jax/issues/12008",
            "https://github.com/jax-ml/jax/issues/14022",
            "https://github.com/typoverflow/flow-rl/issues/12",
            "https://github.com/pytorch/pytorch/issues/79270",
        ),
        "",
    ),
    "D02": Row(
        "bfloat16 passes inside float32 products",
        (
            "https://github.com/jax-ml/jax/issues/9973",
            "https://github.com/jax-ml/jax/issues/1856",
            "https://github.com/jax-ml/jax/issues/10413",
        ),
        "",
    ),
    "D03": Row("a float64 test that runs in float32", ("https://docs.jax.dev/en/latest/default_dtypes.html",), ""),
    "D05": Row(
        "roundings that come or go with a compiler",
        ("https://github.com/jax-ml/jax/issues/23007", "https://github.com/openxla/xla/issues/41605"),
        "",
    ),
    "D06": Row("tensors rounded or changed on the way in", ("https://github.com/TensorAuto/OpenTau/issues/482",), ""),
    "D07": Row("floats to 8 bits: saturating or wrapping", ("https://github.com/pytorch/vision/issues/2950",), ""),
    "D08": Row(
        "memory shared with what changes later",
        ("https://github.com/jax-ml/jax/issues/37830", "https://github.com/jax-ml/jax/issues/19123"),
        "memory that is shared depends on its alignment and cannot be made to order; the twins copy what they load",
    ),
    "D09": Row(
        "a donated buffer that is used again",
        ("https://github.com/jax-ml/jax/issues/3412",),
        "a CPU ignores donation; it takes a device run, which the fast gate is not",
    ),
    "R01": Row(
        "dropout in evaluation, or where it is not meant",
        (
            "https://github.com/huggingface/pytorch-image-models/issues/1978",
            "https://github.com/pytorch/pytorch/issues/124464",
            "https://github.com/wenet-e2e/wenet/issues/2699",
            "https://github.com/karpathy/nanoGPT/issues/240",
        ),
        "",
    ),
    "R03": Row(
        "one random state for several steps",
        ("https://github.com/google/flax/issues/2631", "https://github.com/google/flax/issues/5529"),
        "",
    ),
    "R05": Row("the scale of what is kept", ("https://github.com/NVIDIA/apex/issues/816",), ""),
    "F01": Row(
        "HTK's scale or Slaney's",
        ("https://github.com/pytorch/audio/issues/1058", "https://github.com/pytorch/audio/issues/593"),
        "",
    ),
    "F02": Row(
        "Slaney's areas",
        ("https://github.com/pytorch/audio/issues/287", "https://github.com/keras-team/keras/issues/19194"),
        "",
    ),
    "F04": Row(
        "how the ends of a wave are padded",
        ("https://github.com/espnet/espnet_onnx/issues/71", "https://github.com/pytorch/audio/issues/3037"),
        "",
    ),
    "F06": Row("a floor that another clip moves", ("https://github.com/openai/whisper/issues/2862",), ""),
    "F07": Row("the floor of the logarithm", (), ""),
    "F08": Row("power and logarithm", (), ""),
    "F10": Row("window and transform of unequal sizes", ("https://github.com/pytorch/pytorch/issues/142392",), ""),
    "V01": Row("resizing without antialias", ("https://github.com/pytorch/vision/issues/2950",), ""),
    "V02": Row(
        "the constant of the bicubic kernel",
        (
            "https://github.com/jax-ml/jax/issues/15768",
            "https://github.com/Blaizzy/mlx-vlm/issues/1243",
            "https://github.com/sayakpaul/cmmd-pytorch/issues/5",
        ),
        "",
    ),
    "V04": Row(
        "the order in which patches and heads are laid out",
        ("https://flax.readthedocs.io/en/stable/migrating/convert_pytorch_to_flax.html",),
        "",
    ),
    "V05": Row(
        "rows and columns of kernels",
        (
            "https://github.com/huggingface/transformers/issues/11883",
            "https://flax.readthedocs.io/en/stable/migrating/convert_pytorch_to_flax.html",
        ),
        "",
    ),
    "V06": Row("SAME padding with a stride", ("https://github.com/google/flax/issues/963",), ""),
    "V07": Row("positions resized by another rule", ("https://github.com/Blaizzy/mlx-vlm/issues/2266",), ""),
    "V08": Row(
        "a transposed convolution's kernel",
        (
            "https://github.com/google/flax/issues/3137",
            "https://github.com/google/flax/issues/2578",
            "https://github.com/jax-ml/jax/issues/11252",
        ),
        "neither twin has a transposed convolution",
    ),
    "V09": Row("rescaling, colour order, orientation", (), ""),
    "T01": Row(
        "BOS twice",
        (
            "https://github.com/vllm-project/vllm/issues/16976",
            "https://github.com/OpenRLHF/OpenRLHF/issues/393",
            "https://github.com/deepseek-ai/DeepSeek-R1/issues/151",
        ),
        "",
    ),
    "T02": Row("BOS missing", ("https://github.com/ggml-org/llama.cpp/issues/24428",), ""),
    "T03": Row(
        "prefixes, runs of spaces, special tokens inside text",
        (
            "https://github.com/huggingface/transformers/issues/24569",
            "https://github.com/huggingface/transformers/issues/25069",
            "https://github.com/huggingface/transformers/issues/23818",
            "https://github.com/ggml-org/llama.cpp/issues/167",
        ),
        "",
    ),
    "Q01": Row(
        "the token that crosses p",
        (
            "https://github.com/huggingface/transformers/issues/18976",
            "https://github.com/fishaudio/fish-speech/issues/1171",
            "https://github.com/thu-nics/C2C/issues/21",
            "https://github.com/Biohub/esm/issues/360",
        ),
        "",
    ),
    "Q02": Row(
        "top_p and temperature at their ends", ("https://github.com/huggingface/transformers/issues/19839",), ""
    ),
    "Q03": Row(
        "probabilities taken for logits",
        ("https://github.com/keras-team/keras-core/issues/389", "https://github.com/probml/JSL/issues/57"),
        "",
    ),
    "Q05": Row("a masked token that is drawn", ("https://github.com/pytorch/pytorch/issues/91863",), ""),
    "Q06": Row(
        "beam search",
        (
            "https://github.com/huggingface/transformers/issues/20901",
            "https://github.com/huggingface/transformers/issues/21368",
        ),
        "neither twin has beam search",
    ),
    "K01": Row(
        "a slot of the cache that is not the token's",
        (
            "https://github.com/jax-ml/jax/issues/34257",
            "https://github.com/jax-ml/jax/issues/9083",
            "https://github.com/openxla/xla/issues/49118",
        ),
        "",
    ),
    "K02": Row("padding seen after the first step", ("https://github.com/thu-nics/C2C/issues/19",), ""),
    "K03": Row("a cache mask inverted", ("https://github.com/NVIDIA/TransformerEngine/issues/119",), ""),
    "W01": Row(
        "prefixes of wrappers; parameters left as drawn",
        (
            "https://github.com/karpathy/nanoGPT/issues/325",
            "https://github.com/FareedKhan-dev/train-llm-from-scratch/issues/36",
            "https://github.com/huggingface/pytorch-image-models/issues/2003",
            "https://github.com/pytorch/pytorch/issues/101107",
        ),
        "",
    ),
    "W02": Row(
        "keys missing or unexpected without a word", ("https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/4220",), ""
    ),
    "W03": Row("layers in another order", (), ""),
}
