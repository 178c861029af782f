"""CLIP and T5 of `fluxlab.model` against transformers: the same bits, from the same files."""

import json

import pytest
import torch
from torch import nn

from fluxlab.checkpoints.text import load_encoders, open_encoders
from fluxlab.checkpoints.text_networks import load_network
from fluxlab.model.clip import ClipText
from fluxlab.model.t5 import T5Encoder
from fluxlab.model.t5_blocks import blockwise_states
from fluxlab.model.text import last_layer, pooled

CPU = torch.device("cpu")


def write(folder, activation="quick_gelu", end=3, feed_forward="gated-gelu", scale=1.0):
    """Write random encoders as transformers does. scale: of the second product of T5's MLPs."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20,
        hidden_act=activation,
        eos_token_id=end,
        bos_token_id=2,
        pad_token_id=0,
    )
    t5 = T5Config(
        vocab_size=50, d_model=48, d_kv=16, d_ff=80, num_layers=3, num_heads=2, feed_forward_proj=feed_forward
    )
    models = {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    for name, model in models.items():
        for key, weight in model.named_parameters():
            nn.init.normal_(weight, float("norm" in key and "weight" in key), 0.2)
            if key.endswith("wo.weight"):
                weight.data *= scale
        model.save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
    return folder


def both(folder, dtype):
    """Return (CLIP, T5) of `fluxlab.model`, and of transformers."""
    opened = open_encoders(folder)
    found = [[m.eval() for m in load_encoders(opened, dtype, CPU, "test", own=own)] for own in (True, False)]
    assert [type(network) for network in found[0]] == [ClipText, T5Encoder]
    return found


def agree(mine, theirs, network):
    """Return whether tensors have the same bits, or nearly, for a release of transformers with another kernel."""
    if network.config._attn_implementation == "sdpa":
        return mine.equal(theirs)
    return torch.allclose(mine, theirs, rtol=0, atol=8 * torch.finfo(mine.dtype).eps * theirs.abs().max().item())


def ids(length):
    """Two prompts with end marks, of which the first is at different places, and padding. One has the largest token."""
    tokens = torch.randint(4, 49, (2, length), generator=torch.Generator().manual_seed(1))
    tokens[0, 5:], tokens[1, 9:] = 3, 0
    tokens[1, 8] = 49
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"activation": "gelu", "end": 2, "feed_forward": "relu"},
        {"scale": 3000.0},  # beyond the largest number of fp16
    ],
    ids=["flux", "others", "large"],
)
@torch.inference_mode()
def test_the_bits_are_those_of_transformers(tmp_path, kind, dtype):
    (clip, t5), (their_clip, their_t5) = both(write(tmp_path, **kind), dtype)
    mine, theirs = pooled(clip, ids(20)), pooled(their_clip, ids(20))
    assert mine.dtype == dtype
    assert agree(mine, theirs, their_clip)
    for length in (20, 300):  # 300: every bucket of distances
        mine, theirs = last_layer(t5, ids(length)), last_layer(their_t5, ids(length))
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        assert agree(mine, theirs, their_t5)
        one = ids(length)[:1]
        assert agree(blockwise_states(t5, [one], CPU)[0], last_layer(their_t5, one), their_t5)


def test_the_bias_can_be_read_by_fused_kernels(tmp_path):
    """PyTorch's kernels for GPUs reject other masks, and a slower one with other bits is used."""
    (_, t5), _ = both(write(tmp_path), torch.float32)
    assert t5.encoder.block[0].layer[0].SelfAttention.bias(9).is_contiguous()


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("text_encoder", {"hidden_act": "silu"}),
        ("text_encoder", {"num_attention_heads": 5}),
        ("text_encoder_2", {"feed_forward_proj": "gated-silu"}),
        ("text_encoder_2", {"d_ff": None}),
    ],
)
def test_other_configs_are_left_to_transformers(tmp_path, part, values):
    config = write(tmp_path) / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    found = [load_network(encoder, torch.float32, True) for encoder in open_encoders(tmp_path)]
    assert [network is None for network in found] == [part == "text_encoder", part == "text_encoder_2"]


def test_weights_of_the_stored_dtype_are_mapped(tmp_path):
    """So that two runs of a machine share one copy of T5 in memory."""
    opened = open_encoders(write(tmp_path))
    for encoder in opened:
        network = load_network(encoder, torch.float32, True)
        assert {w.untyped_storage().data_ptr() for w in network.parameters()} <= {
            entry.read().untyped_storage().data_ptr() for entry in encoder.entries.values()
        }
