"""A small language model and its text: GlassLM, trained on Carroll, reads Austen.

    perplexity = exp( mean_w l_w )        l_w = mean_{t=1..127} -log p(x_wt | x_w0 .. x_w,t-1)

over the windows w of 128 tokens, none overlapping, that *Persuasion* is cut into (what is left over is dropped).
Her five other novels are for training. Compare models by paired differences of `losses`, window by window.

GlassLM is 852,608 parameters in Llama's form: RMSNorm, rotary positions, 4 query and 2 key heads, SwiGLU, tied
embeddings. Two things differ from `LlamaForCausalLM`. It writes x W, so every W is transposed. And it rotates
neighbours (2i, 2i + 1) where Llama rotates halves (i, i + d/2), so the rows of W_Q and W_K are put even first, then
odd, in each head; scores, being dot products, do not notice.

The tokenizer is character BPE with 1,024 tokens. It knows no straight quotation mark, so Austen's become <unk>, one
token in a hundred.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwindle.frontends.assets import AUSTEN, GLASSLLM, AssetError, fetch
from dwindle.frontends.modes import evaluating
from dwindle.runtime.errors import CalibrationError

WINDOW = 128
BATCH = 32  # windows at once when evaluating
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
TEST_NOVEL = "persuasion"

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
_SPACE = "\u2581"

_R_HEADER = b"X\n" + struct.pack(">III", 3, 0x00040201, 0x00030500)  # XDR, version 3, R 4.2.1, readable by R 3.5
_R_STRINGS, _R_STRING = 16, 9  # STRSXP and CHARSXP


@dataclass(frozen=True)
class LanguageResult:
    """What a model expects: `losses[w]` is the mean negative log likelihood of window w, in nats a token."""

    losses: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(sum(self.losses) / len(self.losses))

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.2f} ({len(self.losses)} windows of {WINDOW} tokens)"


def load_glass(*, quiet: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer): a `LlamaForCausalLM` in eval mode, fp32 from fp16, and a `tokenizers.Tokenizer`."""
    from transformers import LlamaForCausalLM

    stored = fetch(GLASSLLM, quiet=quiet) / GLASSLLM.key
    with np.load(stored) as arrays:
        weights = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files if name != "__config__"}
        config = json.loads(str(arrays["__config__"]))
    model: Any = LlamaForCausalLM(llama_config(config))
    model.load_state_dict(llama_weights(weights, config))
    return model.eval(), load_tokenizer(stored.with_name("en.tokenizer.json"))


def llama_config(config: Mapping[str, Any]) -> Any:
    """Transformers' configuration for GlassLM's."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=8 * config["d_model"] // 3,
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config["n_kv_heads"],
        max_position_embeddings=config["max_len"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_base"]},
        rms_norm_eps=config["eps"],
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=SPECIALS.index("<eos>"),
    )


def llama_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """GlassLM's arrays under Llama's names, transposed, W_Q and W_K with the halves of each head in place."""
    found = {"model.embed_tokens.weight": weights["E"], "lm_head.weight": weights["E"]}
    found["model.norm.weight"] = weights["norm_f.gamma"]
    for i in range(config["n_layers"]):
        glass, llama = f"blocks.{i}", f"model.layers.{i}"
        found |= {
            f"{llama}.input_layernorm.weight": weights[f"{glass}.norm1.gamma"],
            f"{llama}.self_attn.q_proj.weight": evens_first(weights[f"{glass}.attn.W_Q"].T, config["n_heads"]),
            f"{llama}.self_attn.k_proj.weight": evens_first(weights[f"{glass}.attn.W_K"].T, config["n_kv_heads"]),
            f"{llama}.self_attn.v_proj.weight": weights[f"{glass}.attn.W_V"].T,
            f"{llama}.self_attn.o_proj.weight": weights[f"{glass}.attn.W_O"].T,
            f"{llama}.post_attention_layernorm.weight": weights[f"{glass}.norm2.gamma"],
            f"{llama}.mlp.gate_proj.weight": weights[f"{glass}.ffn.W1"].T,
            f"{llama}.mlp.up_proj.weight": weights[f"{glass}.ffn.W3"].T,
            f"{llama}.mlp.down_proj.weight": weights[f"{glass}.ffn.W2"].T,
        }
    return found


def evens_first(rows: Tensor, heads: int) -> Tensor:
    """(heads * d, K) with the even rows of each head before its odd ones."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])  # (H, d/2, 2, K)
    return pairs.transpose(1, 2).reshape(rows.shape)


def load_tokenizer(path: Path) -> Any:
    """GlassLM's character BPE from its JSON of an alphabet and merges, as a `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    stored = json.loads(path.read_text(encoding="utf-8"))
    merges = [(a, b) for a, b in stored["merges"]]
    tokens = [*SPECIALS, *stored["alphabet"], *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}  # of a token there twice, the last id
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", _SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"\n|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+"), "isolated")
    return tokenizer


def load_austen(tokenizer: Any, *, quiet: bool = False) -> tuple[Tensor, Tensor]:
    """(train, test) token ids, (N,) int64 each: five novels, one after the other, and *Persuasion*."""
    novels = read_novels((fetch(AUSTEN, quiet=quiet) / AUSTEN.key).read_bytes())
    ids = {name: torch.tensor(tokenizer.encode(text).ids) for name, text in novels.items()}
    return torch.cat([ids[name] for name in NOVELS if name != TEST_NOVEL]), ids[TEST_NOVEL]


def read_novels(database: bytes) -> dict[str, str]:
    """The novels of janeaustenr's `Rdata.rdb`, lines joined by newlines. Raises AssetError.

    An .rdb is objects one after the other, each its length in 4 bytes and then R's serialisation under zlib.
    The .rdx beside it says where each begins; here they are in the order of their names, and that is all of them.
    """
    texts, rest = [], database
    while rest:
        stream = zlib.decompressobj()
        try:
            (size,) = struct.unpack_from(">I", rest)
            data = stream.decompress(rest[4:])
            if not stream.eof or len(data) != size:
                raise AssetError("R's database is cut short", required=f"{size:,} bytes", found=f"{len(data):,}")
            texts.append("\n".join(read_strings(data)))
        except (zlib.error, struct.error, UnicodeDecodeError) as error:
            raise AssetError("R's database cannot be read", required="objects under zlib", found=error) from error
        rest = stream.unused_data
    if len(texts) != len(NOVELS):
        raise AssetError("novels are missing", required=len(NOVELS), found=len(texts))
    return dict(zip(NOVELS, texts, strict=True))


def read_strings(data: bytes) -> list[str]:
    """A character vector in R's serialisation (XDR, version 3, UTF-8), without attributes or missing values."""
    (size,) = struct.unpack_from(">I", data, len(_R_HEADER))
    at = len(_R_HEADER) + 4 + size  # past the name of the encoding
    kind, count = struct.unpack_from(">II", data, at)
    at += 8
    if data[:6] != _R_HEADER[:6] or kind != _R_STRINGS:
        raise AssetError("R's data holds something else", required="a character vector", found=f"type {kind & 255}")
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">Ii", data, at)
        at += 8
        if flags & 255 != _R_STRING or size < 0:
            raise AssetError("R's data holds something else", required="a string", found=f"type {flags & 255}, {size}")
        strings.append(data[at : at + size].decode("utf-8"))
        at += size
    if at != len(data):
        raise AssetError("R's data has another length than it says", required=at, found=len(data))
    return strings


def windows(tokens: Tensor, length: int = WINDOW) -> Tensor:
    """(N, length): the tokens cut into windows; what is left over is dropped."""
    if len(tokens) < length:
        raise CalibrationError("too few tokens for a window", required=length, found=len(tokens))
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def evaluate_language(model: Callable[..., Any], tokens: Tensor) -> LanguageResult:
    """The loss of `model` in every window of `tokens` (N,), called with input_ids (32, 128); the last are fewer.

    A module is put in eval mode and back; the model's device is `model.device` where it has one. Raises
    CalibrationError when a loss is not finite.
    """
    device = getattr(model, "device", "cpu")
    losses = []
    with evaluating(model):
        for part in torch.split(windows(tokens).to(device), BATCH):
            logits = model(input_ids=part).logits[:, :-1].float()  # (B, T - 1, V)
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
            losses.append(each.double().mean(dim=1).cpu())  # (B,)
    found = torch.cat(losses)
    if not found.isfinite().all():
        raise CalibrationError("a loss is not finite", required="finite logits", found="NaN or infinity")
    return LanguageResult(tuple(found.tolist()))
