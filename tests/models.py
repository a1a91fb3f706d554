"""Tiny models, one of each kind that matters: `model, inputs = ZOO["llama"]()` and then `model(**inputs)`.

Random weights from a fixed seed, no hub, in eval mode, batch 2 and 8 tokens (images: as small as the model
allows). Nothing global is left changed: the random state is forked. What a fresh model has at 0 or 1
(biases, norms, batch-norm statistics) is randomised too, because a fold that forgets a bias is exact on a
fresh model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]
"""(model in eval mode, keyword arguments of one call)."""

BATCH, TOKENS, VOCABULARY = 2, 8, 99


def first(output: Any) -> Tensor:
    """The tensor that a model gives, or the first value of a tuple, dict or ModelOutput, which is one."""
    if isinstance(output, Tensor):
        return output
    found = next(iter(output.values())) if isinstance(output, dict) else output[0]
    assert isinstance(found, Tensor)
    return found


def _built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """make() under a forked random state, then everything one-dimensional randomised; eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def _tokens(*, seed: int = 1, masked: bool = True) -> dict[str, Tensor]:
    """input_ids (2, 8) int64 and an attention_mask whose second row ends in two padded places."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    if masked:
        mask[1, -2:] = 0
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bert() -> Example:
    """An encoder with biases, post-norm and a pooler: 2 layers, hidden 32, 4 heads."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    inputs = _tokens()
    return _built(lambda: BertModel(config)), inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def bert_classifier(
    layers: int = 2, *, hidden: int = 32, heads: int = 4, vocab: int = VOCABULARY, seed: int = 0, **more: Any
) -> Any:
    """A BertForSequenceClassification in eval mode, its fresh weights by `seed`; `more` is of its config."""
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    config = BertConfig(**(size | {"intermediate_size": 64, "max_position_embeddings": 64} | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def gpt2() -> Example:
    """A decoder with Conv1D layers (transposed weights), one fused QKV, and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    config.use_cache = False
    return _built(lambda: GPT2LMHeadModel(config)), dict(_tokens())


def llama() -> Example:
    """A decoder with RMSNorm, rotary positions, SwiGLU, and 4 heads that share 2 keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _built(lambda: LlamaForCausalLM(config)), dict(_tokens())


def t5() -> Example:
    """Encoder and decoder with a shared embedding, relative positions and a gated FFN; 5 target tokens."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        use_cache=False,
    )
    inputs = _tokens() | {"decoder_input_ids": _tokens(seed=2)["input_ids"][:, :5].contiguous()}
    return _built(lambda: T5ForConditionalGeneration(config)), inputs


def vit() -> Example:
    """A vision transformer with a class token: 16x16 images in patches of 8, so 4 + 1 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return _built(lambda: ViTForImageClassification(config)), {"pixel_values": _random(BATCH, 3, 16, 16)}


def resnet() -> Example:
    """Convolutions with batch norm and residual sums, with and without a projection on the shortcut."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
        num_labels=5,
        hidden_act="relu",
    )
    return _built(lambda: ResNetForImageClassification(config)), {"pixel_values": _random(BATCH, 3, 32, 32)}


def convnext() -> Example:
    """Depthwise 7x7 convolutions, layer norm over channels, and a learned scale per channel."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, image_size=32)
    return _built(lambda: ConvNextForImageClassification(config)), {"pixel_values": _random(BATCH, 3, 32, 32)}


def mlp() -> Example:
    """Three linear layers; the last has no bias."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 32),
            nn.ReLU(),
            nn.Linear(32, 24),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(24, 5, bias=False),
        )

    return _built(make), {"input": _random(BATCH, 16)}


class SmallCNN(nn.Module):
    """Stem, an inverted residual with a depthwise convolution, pooling, linear: all with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._block(3, 8, 3, stride=2)
        self.expand = self._block(8, 24, 1)
        self.depthwise = self._block(24, 24, 3, groups=24)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    @staticmethod
    def _block(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU6())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        x = self.stem(pixel_values)  # (B, 8, H/2, W/2)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean(dim=(2, 3)))


def cnn() -> Example:
    """A hand-written CNN with batch norm, a depthwise convolution and a residual sum; 16x16 images."""
    return _built(SmallCNN), {"pixel_values": _random(BATCH, 3, 16, 16)}


class TiedLM(nn.Module):
    """The smallest language model with one weight under two names: `embedding.weight` is `head.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V)."""
        x = self.embedding(input_ids)  # (B, T, 16)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x)


def tied_lm() -> Example:
    """A toy language model whose embedding and head are one parameter."""
    return _built(TiedLM), {"input_ids": _tokens()["input_ids"]}


ZOO: dict[str, Callable[[], Example]] = {
    "mlp": mlp,
    "cnn": cnn,
    "tied_lm": tied_lm,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "convnext": convnext,
}
